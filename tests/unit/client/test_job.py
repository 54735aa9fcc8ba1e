# SPDX-License-Identifier: Apache-2.0
"""The handle of a job: which events it keeps, which ends it accepts, and how long it waits."""

import asyncio
import logging
from datetime import timedelta
from pathlib import Path

import pytest

from acestep_consumer.client import job as job_module
from acestep_consumer.client.errors import ClientError, NotEndedYet
from acestep_consumer.client.job import IDLE_ANSWERS, JobHandle
from acestep_schemas import examples
from acestep_schemas.events import JobEvent, JobProgress, Progress, TerminalEvent
from tests.support.waiting import eventually

ID = examples.TASK_ID
END = examples.completed()
ENDED_AT = END.data.finished_at


class FakeClient:
    def __init__(self, *, idle: bool = False) -> None:
        self.idle = idle
        self.asked = 0

    async def cancel(self, task_id: str) -> None:
        """Nothing to stop."""

    async def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        return (Path(folder) / (event_or_id if isinstance(event_or_id, str) else event_or_id.subject),)

    async def is_idle(self) -> bool:
        self.asked += 1
        return self.idle


def progress(sequence: int) -> JobProgress:
    data = Progress(task_id=ID, progress=sequence / 10, stage="render", sequence=sequence)
    return JobProgress.of(data, attempt=1, worker_id="w").model_copy(update={"time": ENDED_AT})


def job_with(*events: JobEvent) -> JobHandle:
    job = JobHandle(ID, FakeClient())
    for event in events:
        job.add(event)
    return job


async def events_of(job: JobHandle) -> list[JobEvent]:
    return [event async for event in job.events()]


async def test_of_progress_that_nobody_read_only_the_latest_is_kept() -> None:
    begun = examples.started()
    assert await events_of(job_with(begun, progress(1), progress(2), progress(3), END)) == [begun, progress(3), END]


async def test_who_reads_along_hears_all_of_it_and_who_comes_later_what_was_kept() -> None:
    job = job_with(progress(1))
    early = job.events()
    assert await anext(early) == progress(1)
    job.add(progress(2))
    assert await anext(early) == progress(2)
    job.add(END)
    assert [event async for event in early] == [END]
    assert await events_of(job) == [progress(2), END]


async def test_nothing_is_heard_after_the_end() -> None:
    assert await events_of(job_with(END, progress(9), examples.unfinished("failed"))) == [END]


async def test_a_result_is_that_of_the_terminal_event(tmp_path: Path) -> None:
    assert await job_with(END).result(tmp_path) == (tmp_path / ID,)


@pytest.mark.parametrize(
    ("ending", "sent_before_s", "believed"),
    [
        (examples.completed(), -3600, True),  # songs answer every request for their task
        (examples.unfinished("failed"), -3600, False),  # an earlier try; this one has its own end coming
        (examples.unfinished("failed"), 1, True),
        (examples.unfinished("failed"), -1, True),  # clocks differ
    ],
)
def test_an_end_found_in_storage_counts_unless_it_is_of_an_earlier_try(
    ending: TerminalEvent, sent_before_s: int, *, believed: bool
) -> None:
    job = JobHandle(ID, FakeClient(), since=ENDED_AT - timedelta(seconds=sent_before_s))
    job.add_stored(ending)
    assert (job.ended == ending) is believed


def test_who_follows_somebody_elses_job_believes_any_end() -> None:
    job = JobHandle(ID, FakeClient())
    job.add_stored(examples.unfinished("cancelled"))
    assert job.ended is not None


async def test_when_nothing_more_can_be_heard_whoever_waits_is_told() -> None:
    job = job_with(progress(1))
    job.fail(ClientError("the login was revoked"))
    with pytest.raises(ClientError, match="revoked"):
        await job.wait(1)
    with pytest.raises(ClientError, match="revoked"):
        await events_of(job)


async def test_an_end_that_was_heard_stays_when_the_connection_fails_later() -> None:
    job = job_with(END)
    job.fail(ClientError("closed"))
    assert await job.wait(1) == END
    assert await events_of(job) == [END]


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((), "no event yet: still queued, or an unknown id"),
        ((examples.started(),), "started"),
        ((progress(4),), "render, 40%"),
    ],
)
async def test_a_wait_that_ends_too_soon_says_what_was_heard_and_what_is_not_known(
    events: tuple[JobEvent, ...], words: str
) -> None:
    job = job_with(*events)
    job.note("no keys")
    with pytest.raises(NotEndedYet, match=f"{words}.*no keys"):
        await job.wait(0.01)


@pytest.fixture
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ASK_EVERY_S", 0.01)


@pytest.mark.usefixtures("asks_often")
async def test_a_wait_without_a_limit_for_an_unknown_id_ends_when_no_such_job_can_exist() -> None:
    client = FakeClient(idle=True)
    job = JobHandle(ID, client)
    job.note("no keys")
    with pytest.raises(NotEndedYet, match=f"no job {ID} is known: .*no request waits and no job runs; no keys"):
        await job.wait()
    assert client.asked == IDLE_ANSWERS


@pytest.mark.usefixtures("asks_often")
async def test_while_anything_waits_or_runs_it_may_be_that_job_so_the_wait_goes_on_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = FakeClient()
    job = JobHandle(ID, client)
    with caplog.at_level(logging.WARNING, "acestep_consumer.client"):  # commands, which tests call, silence it
        waiting = asyncio.create_task(job.wait())
        await eventually(lambda: client.asked > 2 * IDLE_ANSWERS)
    assert caplog.messages == [f"{ID}: no event yet: still queued, or an unknown id"]
    job.add(END)
    assert await waiting == END


@pytest.mark.usefixtures("asks_often")
async def test_a_job_of_which_an_event_came_is_waited_for_however_idle_the_workers_say_they_are() -> None:
    client = FakeClient(idle=True)
    job = JobHandle(ID, client)
    job.add(examples.started())
    waiting = asyncio.create_task(job.wait())
    await asyncio.sleep(0.05)
    assert (client.asked, waiting.done()) == (0, False)
    job.add(END)
    assert await waiting == END


@pytest.mark.usefixtures("asks_often")
async def test_a_job_of_this_clients_own_exists_so_nobody_is_asked() -> None:
    client = FakeClient(idle=True)
    job = JobHandle(ID, client, since=ENDED_AT)
    waiting = asyncio.create_task(job.wait())
    await asyncio.sleep(0.05)
    assert (client.asked, waiting.done()) == (0, False)
    job.add(END)
    assert await waiting == END


@pytest.mark.usefixtures("asks_often")
async def test_who_waits_for_an_unknown_job_is_told_when_the_subscription_ends() -> None:
    job = JobHandle(ID, FakeClient())
    waiting = asyncio.create_task(job.wait())
    await asyncio.sleep(0)
    job.fail(ClientError("closed"))
    with pytest.raises(ClientError, match="closed"):
        await waiting


@pytest.mark.parametrize(
    ("events", "shown"),
    [
        ((), "no event yet: still queued, or an unknown id"),
        ((examples.started(),), "started"),
        ((progress(4),), "render, 40%"),
        ((examples.unfinished("failed"),), "failed"),
        ((END,), "completed"),
    ],
)
def test_its_repr_says_which_job_it_is_and_how_far(events: tuple[JobEvent, ...], shown: str) -> None:
    assert repr(job_with(*events)) == f"<Job {ID}: {shown}>"


def test_a_job_that_this_client_submitted_has_no_unknown_id() -> None:
    assert repr(JobHandle(ID, FakeClient(), since=ENDED_AT)) == f"<Job {ID}: no event yet: still queued>"
