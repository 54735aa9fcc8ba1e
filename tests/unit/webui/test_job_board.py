# SPDX-License-Identifier: Apache-2.0
"""The board keeps the last jobs and tells each page what it has not seen."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from acestep_consumer.webui.job_board import JobBoard, QueueState
from acestep_schemas import examples
from acestep_schemas.events import JobStarted, TerminalEvent
from acestep_schemas.request import GenerationRequest

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
    board.hear(started("one"))
    with board.feed() as feed:
        first = board.take(feed)
        assert (first.fresh, [card.task_id for card in first.cards]) == (True, ["one"])
        assert not feed.news.is_set()
        board.hear(started("two"))
        second = board.take(feed)
        assert (second.fresh, [card.task_id for card in second.cards]) == (False, ["two"])


def test_a_page_that_comes_to_an_empty_board_is_told_so() -> None:
    board = JobBoard()
    with board.feed() as feed:
        assert feed.news.is_set()
        assert (board.take(feed).fresh, board.take(feed).cards) == (True, ())


def test_a_page_that_comes_back_gets_what_changed_meanwhile_alone() -> None:
    board = JobBoard()
    board.hear(started("one"))
    mark = board.mark
    board.hear(started("two"))
    with board.feed(mark) as feed:
        batch = board.take(feed)
    assert (batch.fresh, [card.task_id for card in batch.cards]) == (False, ["two"])
    with board.feed(board.mark) as feed:
        assert not feed.news.is_set()


def test_a_page_that_was_with_another_server_or_missed_a_removal_starts_anew() -> None:
    board = JobBoard(kept=1)
    board.hear(failed("one"))
    mark = board.mark
    board.hear(failed("two"))
    for strange in (mark, JobBoard().mark, f"{board.mark}9", "nonsense", f"{board.mark.split('-')[0]}-²"):
        with board.feed(strange) as feed:
            batch = board.take(feed)
            assert (batch.fresh, [card.task_id for card in batch.cards]) == (True, ["two"])


def test_a_slow_page_skips_states_and_holds_no_more_than_there_are_jobs() -> None:
    board = JobBoard(kept=3)
    with board.feed() as feed:
        board.take(feed)
        for number in range(50):
            board.hear(started(f"job-{number}"))
            board.hear(failed(f"job-{number}"))
        assert len(feed.changed) <= 3
        assert len(feed.gone) <= 3
        batch = board.take(feed)
        assert {card.task_id for card in batch.cards} == {"job-47", "job-48", "job-49"}
        assert {card.state for card in batch.cards} == {"failed"}


def test_of_too_many_ended_jobs_the_oldest_is_forgotten_and_none_that_waits_or_runs() -> None:
    board = JobBoard(kept=2)
    for number in range(50):
        board.hear(started(f"runs-{number}"))
        board.order(f"waits-{number}", REQUEST)
    with board.feed() as feed:
        board.take(feed)
        for number in range(3):
            board.hear(failed(f"ended-{number}"))
        assert board.take(feed).gone == ("ended-0",)
    assert len(board.silent(-1)) == 100


def test_memory_has_an_end_and_jobs_that_have_ended_go_first() -> None:
    board = JobBoard(kept=2, most=3)
    for task_id in ("first", "second"):
        board.hear(started(task_id))
    board.hear(failed("ended"))
    board.hear(started("third"))
    assert board.card("ended") is None
    board.hear(started("fourth"))
    assert board.card("first") is None
    assert {card.task_id for card in board.silent(-1)} == {"second", "third", "fourth"}


def test_pages_hear_how_the_broker_is_once_for_each_change() -> None:
    board = JobBoard()
    with board.feed() as feed:
        assert board.take(feed).pulse is None
        board.feel(QueueState(broker=False))
        assert feed.news.is_set()
        assert board.take(feed).pulse == QueueState(broker=False)
        board.feel(QueueState(broker=False))
        assert not feed.news.is_set()


def test_a_page_that_comes_back_hears_how_the_broker_is_if_that_changed_meanwhile() -> None:
    board = JobBoard()
    board.feel(QueueState(broker=True, waiting=0, workers=1))
    mark = board.mark
    with board.feed(mark) as feed:
        assert not feed.news.is_set()
    board.feel(QueueState(broker=False))
    with board.feed(mark) as feed:
        assert feed.news.is_set()
        batch = board.take(feed)
    assert (batch.fresh, batch.cards, batch.pulse) == (False, (), QueueState(broker=False))


def test_an_order_whose_confirm_was_lost_is_in_doubt_until_a_worker_tells_of_it() -> None:
    board = JobBoard()
    board.order("one", REQUEST)
    board.doubt("one")
    board.doubt("unknown")
    card = board.card("one")
    assert card is not None
    assert (card.state, card.unsure) == ("waiting", True)
    board.hear(started("one"))
    board.doubt("one")
    card = board.card("one")
    assert card is not None
    assert not card.unsure


def test_an_order_waits_until_a_worker_takes_it_and_keeps_its_words() -> None:
    board = JobBoard()
    board.order("one", REQUEST)
    card = board.card("one")
    assert card is not None
    assert (card.state, card.request) == ("waiting", {"prompt": "slow jazz"})
    board.hear(started("one"))
    card = board.card("one")
    assert card is not None
    assert (card.state, card.request) == ("running", {"prompt": "slow jazz"})


def test_an_order_that_was_refused_goes_and_one_that_runs_all_the_same_stays() -> None:
    board = JobBoard()
    board.order("refused", REQUEST)
    board.withdraw("refused")
    board.order("taken", REQUEST)
    board.hear(started("taken"))
    board.withdraw("taken")
    board.withdraw("unknown")
    assert board.card("refused") is None
    assert board.card("taken") is not None


def test_a_job_that_is_to_stop_shows_it_until_it_has_ended() -> None:
    board = JobBoard()
    board.hear(started("one"))
    board.stop("one")
    card = board.card("one")
    assert card is not None
    assert card.stopping
    board.hear(unfinished("cancelled", "one"))
    board.stop("one")
    card = board.card("one")
    assert card is not None
    assert (card.state, card.stopping) == ("cancelled", False)


def test_silent_jobs_are_those_that_have_not_ended_and_said_nothing_for_long() -> None:
    clock = Clock()
    board = JobBoard(clock=clock)
    board.hear(started("old"))
    board.hear(failed("ended"))
    clock.now += timedelta(seconds=50)
    board.hear(started("new"))
    clock.now += timedelta(seconds=20)
    assert [card.task_id for card in board.silent(60)] == ["old"]


def test_a_page_that_left_costs_nothing() -> None:
    board = JobBoard()
    with board.feed():
        assert board.watched == 1
    assert board.watched == 0


def test_waking_lets_pages_through_without_news() -> None:
    board = JobBoard()
    with board.feed(board.mark) as feed:
        board.wake()
        assert feed.news.is_set()
        assert board.take(feed).cards == ()
