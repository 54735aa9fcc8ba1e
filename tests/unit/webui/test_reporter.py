# SPDX-License-Identifier: Apache-2.0
"""Events go up on the board, and ends that were missed are looked up."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from acestep_consumer.client import DownloadFailed
from acestep_consumer.webui import reporter
from acestep_consumer.webui.job_board import JobBoard, QueueState
from acestep_schemas import examples
from acestep_schemas.events import JobEvent, TerminalEvent, WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.waiting import eventually

TASK = examples.TASK_ID


class Endings:
    """Storage that fails once and then knows one end."""

    def __init__(self, ending: TerminalEvent) -> None:
        self.ending = ending
        self.asked = 0

    async def find(self, task_id: str) -> TerminalEvent | None:
        assert task_id == TASK
        self.asked += 1
        if self.asked == 1:
            raise DownloadFailed("away")
        return self.ending


async def caught_up(board: JobBoard, endings: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the look-ups go on until the third; the job's state then."""
    monkeypatch.setattr(reporter, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(reporter, "SILENT_S", 0.0)
    work = asyncio.create_task(reporter.catch_up(board, endings))
    try:
        await eventually(lambda: endings.asked >= 3 or board.silent(0) == (), 10)
    finally:
        work.cancel()
    card = board.card(TASK)
    assert card is not None
    return card.state


def waiting() -> JobBoard:
    board = JobBoard()
    board.order(TASK, GenerationRequest(prompt="x"))
    return board


async def test_events_of_jobs_go_up_and_those_of_workers_do_not() -> None:
    async def events() -> AsyncIterator[JobEvent | WorkerEvent]:
        yield examples.worker()
        yield examples.started()

    board = JobBoard()
    await reporter.report(events(), board)
    assert board.card(TASK) is not None
    assert board.card(examples.WORKER_ID) is None


async def test_the_end_of_a_silent_job_is_found_in_storage_also_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endings = Endings(examples.completed())
    assert await caught_up(waiting(), endings, monkeypatch) == "completed"
    assert endings.asked == 2


async def test_an_earlier_cancellation_of_the_same_id_does_not_end_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = examples.unfinished("cancelled").model_copy(update={"time": datetime.now(UTC) - timedelta(hours=1)})
    assert await caught_up(waiting(), Endings(earlier), monkeypatch) == "waiting"


async def test_the_board_is_told_again_and_again_how_the_broker_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "FEEL_EVERY_S", 0.001)
    seen = [QueueState(broker=True, waiting=0, workers=1), QueueState(broker=False)]

    async def look() -> QueueState:
        return seen.pop(0) if len(seen) > 1 else seen[0]

    board = JobBoard()
    with board.feed() as feed:
        work = asyncio.create_task(reporter.feel(look, board))
        try:
            await eventually(lambda: board.take(feed).pulse == QueueState(broker=False), 10)
        finally:
            work.cancel()
