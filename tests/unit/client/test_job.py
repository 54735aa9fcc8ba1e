# SPDX-License-Identifier: Apache-2.0
"""What a job keeps of its events, and which ends it believes."""

from datetime import timedelta
from pathlib import Path

import pytest

from acestep_consumer.client.errors import ClientError, NotEndedYet
from acestep_consumer.client.job import JobHandle
from acestep_schemas import examples
from acestep_schemas.events import JobEvent, JobProgress, Progress, TerminalEvent

ID = examples.TASK_ID
END = examples.completed()
ENDED_AT = END.data.finished_at


class Nobody:
    async def cancel(self, task_id: str) -> None:
        """Nothing to stop."""

    async def result(self, event_or_id: TerminalEvent | str, folder: Path | str) -> tuple[Path, ...]:
        return (Path(folder) / (event_or_id if isinstance(event_or_id, str) else event_or_id.subject),)


def progress(sequence: int) -> JobProgress:
    data = Progress(task_id=ID, progress=sequence / 10, stage="render", sequence=sequence)
    return JobProgress.of(data, attempt=1, worker_id="w").model_copy(update={"time": ENDED_AT})


def told(*events: JobEvent) -> JobHandle:
    job = JobHandle(ID, Nobody())
    for event in events:
        job.tell(event)
    return job


async def heard(job: JobHandle) -> list[JobEvent]:
    return [event async for event in job.events()]


async def test_of_progress_that_nobody_read_only_the_latest_is_kept() -> None:
    begun = examples.started()
    assert await heard(told(begun, progress(1), progress(2), progress(3), END)) == [begun, progress(3), END]


async def test_who_reads_along_hears_all_of_it_and_who_comes_later_what_was_kept() -> None:
    job = told(progress(1))
    early = job.events()
    assert await anext(early) == progress(1)
    job.tell(progress(2))
    assert await anext(early) == progress(2)
    job.tell(END)
    assert [event async for event in early] == [END]
    assert await heard(job) == [progress(2), END]


async def test_nothing_is_heard_after_the_end() -> None:
    assert await heard(told(END, progress(9), examples.unfinished("failed"))) == [END]


async def test_a_result_is_that_of_the_terminal_event(tmp_path: Path) -> None:
    assert await told(END).result(tmp_path) == (tmp_path / ID,)


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
    job = JobHandle(ID, Nobody(), since=ENDED_AT - timedelta(seconds=sent_before_s))
    job.found(ending)
    assert (job.ended == ending) is believed


def test_who_follows_somebody_elses_job_believes_any_end() -> None:
    job = JobHandle(ID, Nobody())
    job.found(examples.unfinished("cancelled"))
    assert job.ended is not None


async def test_when_nothing_more_can_be_heard_whoever_waits_is_told() -> None:
    job = told(progress(1))
    job.fail(ClientError("the login was revoked"))
    with pytest.raises(ClientError, match="revoked"):
        await job.wait(1)
    with pytest.raises(ClientError, match="revoked"):
        await heard(job)


async def test_an_end_that_was_heard_stays_when_the_connection_fails_later() -> None:
    job = told(END)
    job.fail(ClientError("closed"))
    assert await job.wait(1) == END
    assert await heard(job) == [END]


@pytest.mark.parametrize(
    ("events", "words"),
    [((), "nothing heard"), ((examples.started(),), "started"), ((progress(4),), "render, 40%")],
)
async def test_a_wait_that_ends_too_soon_says_what_was_heard_and_what_is_not_known(
    events: tuple[JobEvent, ...], words: str
) -> None:
    job = told(*events)
    job.remark("no keys")
    with pytest.raises(NotEndedYet, match=f"{words}.*no keys"):
        await job.wait(0.01)
