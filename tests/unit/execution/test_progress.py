# SPDX-License-Identifier: Apache-2.0
"""The narrator: started once, progress that only rises and is rare, nothing after the end, nothing held up."""

import asyncio
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


def narrator(events: FakeEvents) -> ProgressReporter:
    return ProgressReporter(events, admitted_job(), RunInfo("worker-1", 1, datetime.now(UTC)), REPLY, Estimate(20.0))


def progress(events: FakeEvents) -> list[Progress]:
    return [event.data for event, _ in events.published if isinstance(event, JobProgress)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acestep_consumer.execution.progress.INTERVAL_S", 0.01)


@pytest.mark.usefixtures("quick")
async def test_progress_rises_and_is_numbered() -> None:
    events = FakeEvents()
    async with narrator(events) as voice:
        for step in (1, 2, 1, 8, 5):
            voice.report(step / 8, "render")
            await asyncio.sleep(0.02)
    told = progress(events)
    fractions = [data.progress for data in told]
    assert fractions == sorted(set(fractions))
    assert [data.sequence for data in told] == list(range(1, len(told) + 1))
    assert fractions[-1] == 0.9, "rendering is nine tenths of a job without a language model"


async def test_a_burst_of_reports_becomes_at_most_two_events_a_second() -> None:
    events = FakeEvents()
    async with narrator(events) as voice:
        for step in range(100):
            voice.report(step / 100, "render")
            await asyncio.sleep(0.001)
    assert len(progress(events)) <= 1


async def test_a_job_that_is_done_at_once_tells_of_its_start_alone() -> None:
    events = FakeEvents()
    async with narrator(events) as voice:
        voice.report(1.0, "render")
        await asyncio.sleep(0.01)
    assert events.states == ["started"]


@pytest.mark.usefixtures("quick")
async def test_nothing_is_said_after_the_end() -> None:
    events = FakeEvents()
    async with narrator(events) as voice:
        pass
    said = len(events.published)
    voice.report(1.0, "upload")
    await asyncio.sleep(0.05)
    assert len(events.published) == said


async def test_leaving_waits_for_the_publish_in_flight() -> None:
    events, gate = FakeEvents(), asyncio.Event()
    publish = events.publish

    async def slow(event: JobEvent, reply: Reply) -> None:
        await gate.wait()
        await publish(event, reply)

    events.publish = slow  # type: ignore[method-assign]

    async def tell() -> None:
        async with narrator(events):
            await asyncio.sleep(0)

    leaving = asyncio.create_task(tell())
    done, _ = await asyncio.wait((leaving,), timeout=0.05)
    assert not done
    gate.set()
    await leaving
    assert events.states == ["started"]


async def test_a_broker_that_is_away_does_not_hurt_the_job() -> None:
    events = FakeEvents(down=True)
    async with narrator(events) as voice:
        voice.report(0.5, "render")
        await asyncio.sleep(0)
    assert events.published == []


@pytest.mark.usefixtures("quick")
async def test_the_start_says_what_is_expected_and_progress_what_remains() -> None:
    events = FakeEvents()
    async with narrator(events) as voice:
        for step in (2, 4, 6):
            voice.report(step / 8, "render")
            await asyncio.sleep(0.02)
    started = events.published[0][0]
    assert isinstance(started, JobStarted)
    assert started.data.expected_s == 20.0
    remaining = [data.remaining_s for data in progress(events)]
    assert remaining == sorted(remaining, key=lambda seconds: -(seconds or 0))
    assert all(seconds is not None and 0 < seconds < 20 for seconds in remaining)
