# SPDX-License-Identifier: Apache-2.0
"""Progress events: started once, progress that only rises and is rare, none after the end, nothing held up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from acestep_consumer.domain.outcome import RunInfo
from acestep_consumer.domain.ports import Reply
from acestep_consumer.execution.eta import Estimate
from acestep_consumer.execution.progress import ProgressReporter
from acestep_schemas.events import JobEvent, JobProgress, JobStarted, Progress
from tests.support.admission import admitted_job
from tests.support.fakes import FakeEvents

REPLY = Reply(reply_to=None, correlation_id="c-1")


def reporter(events: FakeEvents) -> ProgressReporter:
    return ProgressReporter(events, admitted_job(), RunInfo("worker-1", 1, datetime.now(UTC)), REPLY, Estimate(20.0))


@asynccontextmanager
async def reporting(events: FakeEvents) -> AsyncIterator[ProgressReporter]:
    """A job's reporter, from its start to the moment before the terminal event."""
    with reporter(events) as progress:
        yield progress
    await progress.finished()


def progress(events: FakeEvents) -> list[Progress]:
    return [event.data for event, _ in events.published if isinstance(event, JobProgress)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acestep_consumer.execution.progress.INTERVAL_S", 0.01)


@pytest.mark.usefixtures("quick")
async def test_progress_rises_and_is_numbered() -> None:
    events = FakeEvents()
    async with reporting(events) as job:
        for step in (1, 2, 1, 8, 5):
            job.report(step / 8, "render")
            await asyncio.sleep(0.02)
    told = progress(events)
    fractions = [data.progress for data in told]
    assert fractions == sorted(set(fractions))
    assert [data.sequence for data in told] == list(range(1, len(told) + 1))
    assert fractions[-1] == 0.9, "rendering is nine tenths of a job without a language model"


async def test_a_burst_of_reports_becomes_at_most_two_events_a_second() -> None:
    events = FakeEvents()
    async with reporting(events) as job:
        for step in range(100):
            job.report(step / 100, "render")
            await asyncio.sleep(0)  # takes no time: on a busy machine, a hundred times a millisecond can be a second
    assert len(progress(events)) <= 1


async def test_a_job_that_is_done_at_once_publishes_started_alone() -> None:
    events = FakeEvents()
    async with reporting(events) as job:
        job.report(1.0, "render")
        await asyncio.sleep(0.01)
    assert events.states == ["started"]


@pytest.mark.usefixtures("quick")
async def test_nothing_is_published_after_the_end() -> None:
    events = FakeEvents()
    async with reporting(events) as job:
        pass
    said = len(events.published)
    job.report(1.0, "upload")
    await asyncio.sleep(0.05)
    assert len(events.published) == said


async def test_the_job_does_not_wait_for_a_publish_and_the_terminal_event_does() -> None:
    events, gate = FakeEvents(), asyncio.Event()
    publish = events.publish

    async def slow(event: JobEvent, reply: Reply) -> None:
        await gate.wait()
        await publish(event, reply)

    events.publish = slow  # type: ignore[method-assign]
    with reporter(events) as job:
        await asyncio.sleep(0)
    finishing = asyncio.create_task(job.finished())
    done, _ = await asyncio.wait((finishing,), timeout=0.05)
    assert not done
    gate.set()
    await finishing
    assert events.states == ["started"]


async def test_an_unreachable_broker_does_not_fail_the_job() -> None:
    events = FakeEvents(down=True)
    async with reporting(events) as job:
        job.report(0.5, "render")
        await asyncio.sleep(0)
    assert events.published == []


@pytest.mark.usefixtures("quick")
async def test_the_start_says_what_is_expected_and_progress_what_remains() -> None:
    events = FakeEvents()
    async with reporting(events) as job:
        for step in (2, 4, 6):
            job.report(step / 8, "render")
            await asyncio.sleep(0.02)
    started = events.published[0][0]
    assert isinstance(started, JobStarted)
    assert started.data.expected_s == 20.0
    remaining = [data.remaining_s for data in progress(events)]
    assert remaining == sorted(remaining, key=lambda seconds: -(seconds or 0))
    assert all(seconds is not None and 0 < seconds < 20 for seconds in remaining)


async def test_started_carries_the_request_without_audio_and_codes_and_none_that_is_huge() -> None:
    job = admitted_job()
    for changes, carried in (
        ({"prompt": "slow jazz", "audio_code_string": "<|audio_code_1|>" * 9, "src_audio_base64": "UklGRg=="}, True),
        ({"lyrics": "雨" * 32_768, "prompt": "静" * 8_192}, True),
        ({"lyrics": "x" * (200 << 10)}, False),
    ):
        events = FakeEvents()
        asked = replace(job, request=job.request.model_copy(update=changes))
        info = RunInfo("worker-1", 1, datetime.now(UTC))
        with ProgressReporter(events, asked, info, REPLY, Estimate(20.0)) as progress_of:
            pass
        await progress_of.finished()
        (event, _), *_ = events.published
        assert isinstance(event, JobStarted)
        assert (event.data.request is not None) is carried
        if event.data.request is not None:
            assert (event.data.request.prompt, event.data.request.audio_code_string) == (changes["prompt"], "")
            assert b"UklGRg" not in event.to_json()
