# SPDX-License-Identifier: Apache-2.0
"""The board keeps the latest jobs, sends each page what it has not seen, and is kept up to date."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from acestep_consumer.client import DownloadFailed
from acestep_consumer.webui import job_board
from acestep_consumer.webui.job_board import JobBoard, QueueState, add_events, look_up_silent_jobs, poll_queue_state
from acestep_schemas import examples
from acestep_schemas.events import JobCompleted, JobEvent, JobStarted, TerminalEvent, WorkerEvent
from acestep_schemas.request import GenerationRequest
from tests.support.waiting import eventually

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
REQUEST = GenerationRequest(prompt="slow jazz")


@dataclass
class Clock:
    now: datetime = field(default=NOW)

    def __call__(self) -> datetime:
        return self.now


def started(task_id: str) -> JobStarted:
    return JobStarted.of(examples.started().data.model_copy(update={"task_id": task_id}))


def unfinished(status: str, task_id: str) -> TerminalEvent:
    event = examples.unfinished(status)
    return event.model_copy(update={"subject": task_id, "data": event.data.model_copy(update={"task_id": task_id})})


def failed(task_id: str) -> TerminalEvent:
    return unfinished("failed", task_id)


def test_a_page_that_comes_gets_everything_and_then_what_changes() -> None:
    board = JobBoard()
    board.add_event(started("one"))
    with board.feed() as feed:
        first = board.take(feed)
        assert (first.fresh, [view.task_id for view in first.cards]) == (True, ["one"])
        assert not feed.available.is_set()
        board.add_event(started("two"))
        second = board.take(feed)
        assert (second.fresh, [view.task_id for view in second.cards]) == (False, ["two"])


def test_a_page_that_opens_an_empty_board_gets_an_empty_update() -> None:
    board = JobBoard()
    with board.feed() as feed:
        assert feed.available.is_set()
        assert (board.take(feed).fresh, board.take(feed).cards) == (True, ())


def test_a_page_that_comes_back_gets_what_changed_meanwhile_alone() -> None:
    board = JobBoard()
    board.add_event(started("one"))
    cursor = board.cursor
    board.add_event(started("two"))
    with board.feed(cursor) as feed:
        update = board.take(feed)
    assert (update.fresh, [view.task_id for view in update.cards]) == (False, ["two"])
    with board.feed(board.cursor) as feed:
        assert not feed.available.is_set()


def test_a_page_that_was_with_another_server_or_missed_a_removal_starts_anew() -> None:
    board = JobBoard(max_ended=1)
    board.add_event(failed("one"))
    cursor = board.cursor
    board.add_event(failed("two"))
    for strange in (cursor, JobBoard().cursor, f"{board.cursor}9", "nonsense", f"{board.cursor.split('-')[0]}-²"):
        with board.feed(strange) as feed:
            update = board.take(feed)
            assert (update.fresh, [view.task_id for view in update.cards]) == (True, ["two"])


def test_a_slow_page_skips_states_and_holds_no_more_than_there_are_jobs() -> None:
    board = JobBoard(max_ended=3)
    with board.feed() as feed:
        board.take(feed)
        for number in range(50):
            board.add_event(started(f"job-{number}"))
            board.add_event(failed(f"job-{number}"))
        assert len(feed.changed) <= 3
        assert len(feed.gone) <= 3
        update = board.take(feed)
        assert {view.task_id for view in update.cards} == {"job-47", "job-48", "job-49"}
        assert {view.state for view in update.cards} == {"failed"}


def test_of_too_many_ended_jobs_the_oldest_is_forgotten_and_none_that_waits_or_runs() -> None:
    board = JobBoard(max_ended=2)
    for number in range(50):
        board.add_event(started(f"runs-{number}"))
        board.add_request(f"waits-{number}", REQUEST)
    with board.feed() as feed:
        board.take(feed)
        for number in range(3):
            board.add_event(failed(f"ended-{number}"))
        assert board.take(feed).gone == ("ended-0",)
    assert len(board.silent(-1)) == 100


def test_memory_is_bounded_and_jobs_that_have_ended_go_first() -> None:
    board = JobBoard(max_ended=2, max_jobs=3)
    for task_id in ("first", "second"):
        board.add_event(started(task_id))
    board.add_event(failed("ended"))
    board.add_event(started("third"))
    assert board.get("ended") is None
    board.add_event(started("fourth"))
    assert board.get("first") is None
    assert {view.task_id for view in board.silent(-1)} == {"second", "third", "fourth"}


def test_pages_get_the_queues_state_once_for_each_change() -> None:
    board = JobBoard()
    with board.feed() as feed:
        assert board.take(feed).queue_state is None
        board.set_queue_state(QueueState(broker=False))
        assert feed.available.is_set()
        assert board.take(feed).queue_state == QueueState(broker=False)
        board.set_queue_state(QueueState(broker=False))
        assert not feed.available.is_set()


def test_a_page_that_reconnects_gets_the_queues_state_if_that_changed_meanwhile() -> None:
    board = JobBoard()
    board.set_queue_state(QueueState(broker=True, waiting=0, workers=1))
    cursor = board.cursor
    with board.feed(cursor) as feed:
        assert not feed.available.is_set()
    board.set_queue_state(QueueState(broker=False))
    with board.feed(cursor) as feed:
        assert feed.available.is_set()
        update = board.take(feed)
    assert (update.fresh, update.cards, update.queue_state) == (False, (), QueueState(broker=False))


def test_a_request_whose_confirm_was_lost_is_unsure_until_a_worker_begins_it() -> None:
    board = JobBoard()
    board.add_request("one", REQUEST)
    board.mark_unsure("one")
    board.mark_unsure("unknown")
    view = board.get("one")
    assert view is not None
    assert (view.state, view.unsure) == ("waiting", True)
    board.add_event(started("one"))
    board.mark_unsure("one")
    view = board.get("one")
    assert view is not None
    assert not view.unsure


def test_a_request_waits_until_a_worker_begins_it_and_stays_shown() -> None:
    board = JobBoard()
    board.add_request("one", REQUEST)
    view = board.get("one")
    assert view is not None
    assert (view.state, view.request) == ("waiting", {"prompt": "slow jazz"})
    board.add_event(started("one"))
    view = board.get("one")
    assert view is not None
    assert (view.state, view.request) == ("running", {"prompt": "slow jazz"})


def test_a_request_that_was_refused_is_removed_and_one_that_runs_all_the_same_stays() -> None:
    board = JobBoard()
    board.add_request("refused", REQUEST)
    board.remove_request("refused")
    board.add_request("taken", REQUEST)
    board.add_event(started("taken"))
    board.remove_request("taken")
    board.remove_request("unknown")
    assert board.get("refused") is None
    assert board.get("taken") is not None


def test_a_job_that_is_to_stop_shows_it_until_it_has_ended() -> None:
    board = JobBoard()
    board.add_event(started("one"))
    board.mark_stopping("one")
    view = board.get("one")
    assert view is not None
    assert view.stopping
    board.add_event(unfinished("cancelled", "one"))
    board.mark_stopping("one")
    view = board.get("one")
    assert view is not None
    assert (view.state, view.stopping) == ("cancelled", False)


def test_silent_jobs_are_those_that_have_not_ended_and_sent_no_event_for_long() -> None:
    clock = Clock()
    board = JobBoard(clock=clock)
    board.add_event(started("old"))
    board.add_event(failed("ended"))
    clock.now += timedelta(seconds=50)
    board.add_event(started("new"))
    clock.now += timedelta(seconds=20)
    assert [view.task_id for view in board.silent(60)] == ["old"]


def test_a_page_that_left_costs_nothing() -> None:
    board = JobBoard()
    with board.feed():
        assert board.viewers == 1
    assert board.viewers == 0


def test_waking_lets_pages_through_without_news() -> None:
    board = JobBoard()
    with board.feed(board.cursor) as feed:
        board.wake()
        assert feed.available.is_set()
        assert board.take(feed).cards == ()


class FakeResults:
    """Storage that fails once and then knows one end."""

    def __init__(self, end: TerminalEvent) -> None:
        self.end = end
        self.asked = 0

    async def find(self, task_id: str) -> TerminalEvent | None:
        assert task_id == examples.TASK_ID
        self.asked += 1
        if self.asked == 1:
            raise DownloadFailed("unreachable")
        return self.end


async def state_after_look_ups(board: JobBoard, results: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Look up three times at most; the job's state then."""
    monkeypatch.setattr(job_board, "LOOK_UP_EVERY_S", 0.001)
    monkeypatch.setattr(job_board, "SILENT_S", 0.0)
    work = asyncio.create_task(look_up_silent_jobs(board, results))
    try:
        await eventually(lambda: results.asked >= 3 or board.silent(0) == (), 10)
    finally:
        work.cancel()
    view = board.get(examples.TASK_ID)
    assert view is not None
    return view.state


def board_with_a_waiting_job() -> JobBoard:
    board = JobBoard()
    board.add_request(examples.TASK_ID, GenerationRequest(prompt="x"))
    return board


async def test_events_of_jobs_are_added_and_those_of_workers_are_not() -> None:
    async def events() -> AsyncIterator[JobEvent | WorkerEvent]:
        yield examples.worker()
        yield examples.started()

    board = JobBoard()
    await add_events(events(), board)
    assert board.get(examples.TASK_ID) is not None
    assert board.get(examples.WORKER_ID) is None


async def test_the_end_of_a_silent_job_is_found_in_storage_also_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = FakeResults(examples.completed())
    assert await state_after_look_ups(board_with_a_waiting_job(), results, monkeypatch) == "completed"
    assert results.asked == 2


async def test_an_earlier_cancellation_of_the_same_id_does_not_end_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = examples.unfinished("cancelled").model_copy(update={"time": datetime.now(UTC) - timedelta(hours=1)})
    assert await state_after_look_ups(board_with_a_waiting_job(), FakeResults(earlier), monkeypatch) == "waiting"


async def test_the_queues_state_is_polled_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_board, "POLL_EVERY_S", 0.001)
    seen = [QueueState(broker=True, waiting=0, workers=1), QueueState(broker=False)]

    async def poll() -> QueueState:
        return seen.pop(0) if len(seen) > 1 else seen[0]

    board = JobBoard()
    with board.feed() as feed:
        work = asyncio.create_task(poll_queue_state(poll, board))
        try:
            await eventually(lambda: board.take(feed).queue_state == QueueState(broker=False), 10)
        finally:
            work.cancel()


def completed(task_id: str) -> JobEvent:
    return JobCompleted.of(examples.completed().data.model_copy(update={"task_id": task_id}))


def test_jobs_without_songs_drive_no_song_out() -> None:
    board = JobBoard(max_ended=3)
    for number in range(3):
        board.add_event(completed(f"song-{number}"))
    for number in range(80):
        board.add_event(unfinished("cancelled", f"cancelled-{number}"))
    assert all(board.get(f"song-{number}") for number in range(3))
    assert [number for number in range(80) if board.get(f"cancelled-{number}")] == [77, 78, 79]
    board.add_event(completed("song-3"))
    assert board.get("song-0") is None


def test_where_memory_is_short_jobs_without_songs_go_first() -> None:
    board = JobBoard(max_jobs=3)
    board.add_event(completed("song"))
    board.add_event(failed("failed"))
    board.add_event(started("one"))
    board.add_event(started("two"))
    assert board.get("failed") is None
    assert board.get("song") is not None


def test_a_request_is_being_sent_until_the_broker_has_it_and_has_a_place_then() -> None:
    board = JobBoard()
    board.add_worker(WorkerEvent.of(examples.worker().data.model_copy(update={"prefetch": 1, "seconds_per_job": 10.0})))
    board.add_request("mine", REQUEST)
    with board.feed() as feed:
        first = board.take(feed)
        assert (first.cards[0].sending, first.places) == (True, {})
        board.mark_sent("mine", 2)
        update = board.take(feed)
        assert (update.cards[0].sending, update.places["mine"].place) == (False, 2)
        assert update.places["mine"].expected_s is not None
        board.add_event(started("of somebody else"))
        assert board.take(feed).places["mine"].place == 1
        board.add_event(started("mine"))
        assert board.take(feed).places == {}


def test_a_job_that_began_before_the_confirm_has_no_place() -> None:
    board = JobBoard()
    board.add_request("quick", REQUEST)
    board.add_event(started("quick"))
    board.mark_sent("quick", 1)
    with board.feed() as feed:
        update = board.take(feed)
    assert (update.cards[0].state, update.cards[0].sending, update.places) == ("running", False, {})


def test_an_announcement_that_changes_what_the_page_shows_reaches_it() -> None:
    board = JobBoard()
    with board.feed() as feed:
        board.take(feed)
        event = WorkerEvent.of(examples.worker().data.model_copy(update={"lm": None, "models": ("turbo",)}))
        board.add_worker(event)
        assert feed.available.is_set()
        workers = board.take(feed).workers
        assert (workers.lm, workers.models) == (False, ("turbo",))
        board.add_worker(event)
        assert not feed.available.is_set()


def test_songs_for_an_archive_are_those_of_jobs_on_this_board() -> None:
    board = JobBoard()
    board.add_event(completed("one"))
    board.add_event(failed("two"))
    epoch = board.cursor.split("-")[0]
    found = board.archived(epoch, [1, 2, 99])
    assert found is not None
    assert [task_id for task_id, _ in found] == ["one"]
    assert board.archived("another", [1]) is None
