# SPDX-License-Identifier: Apache-2.0
"""Dead-letter notices: each gets its event, also where no record of it can be written."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import AsyncMock

import pytest

from acestep_consumer.broker.dead_letter_notices import DeadLetterNotice
from acestep_consumer.concurrency.locks import KeyedLock
from acestep_consumer.domain.errors import ManifestUnreadable
from acestep_consumer.domain.outcome import OTHER_BODY, TerminalRecord
from acestep_consumer.domain.ports import BodyFormat, Reply
from acestep_consumer.worker.expirations import ExpirationHandler
from acestep_schemas import examples

if TYPE_CHECKING:
    from acestep_consumer.execution.runner import JobRunner
    from acestep_schemas.events import TerminalEvent


class ForeignObjects:
    """A store in which something else lies at each manifest's place."""

    async def find(self, task_id: str) -> Any:
        raise ManifestUnreadable(task_id)


async def unreadable(task_id: str, *_: Any, **__: Any) -> bool:
    raise ManifestUnreadable(task_id)


class Recorder:
    def __init__(self) -> None:
        self.events: list[TerminalEvent] = []

    async def publish(self, event: Any, reply: Reply | None) -> None:
        self.events.append(event)


def notice_of(task_id: str) -> DeadLetterNotice:
    return DeadLetterNotice(
        body=b"{}",
        message_id=task_id,
        body_format=BodyFormat(),
        reply=Reply(),
        reason="expired",
        at=datetime(2026, 1, 1, tzinfo=UTC),
        queue="q",
        fingerprint="f",
    )


async def test_a_request_whose_manifest_is_something_else_gets_its_event_once() -> None:
    """Its notice would come back every few seconds otherwise, and hold the others up."""
    events = Recorder()
    rules = SimpleNamespace(worker_id="w")
    parts = SimpleNamespace(exclusively=KeyedLock().of, rules=rules, others_over=unreadable, forget=AsyncMock())
    runner = cast("JobRunner", parts)
    handler = ExpirationHandler(cast("Any", ForeignObjects()), cast("Any", events), runner)
    await handler.tell(notice_of("song"))
    assert [(event.state, event.data.task_id) for event in events.events] == [("expired", "song")]


class Replaced:
    """A store whose record of the expiration is replaced by the songs of a worker that had begun meanwhile."""

    def __init__(self, songs: TerminalRecord) -> None:
        self.songs = songs
        self.told: TerminalRecord | None = None
        self.over = False

    async def find(self, task_id: str) -> TerminalRecord | None:
        return self.songs if self.over else self.told

    async def missing(self, record: TerminalRecord) -> bool:
        return False

    async def commit(self, record: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        self.told = record
        return record

    async def others_over(self, task_id: str, message: str, *, delivered: bool, with_songs: bool = False) -> bool:
        """No attempt is there before the record, and one after it, which is waited for."""
        assert with_songs is (self.told is not None)
        self.over = with_songs
        return with_songs


async def test_songs_of_a_worker_that_began_between_the_two_looks_are_told_and_no_expiration() -> None:
    ending = examples.completed().data.model_copy(update={"task_id": "song"})
    store, events = Replaced(TerminalRecord(ending, "f")), Recorder()
    parts = SimpleNamespace(
        exclusively=KeyedLock().of,
        rules=SimpleNamespace(worker_id="w"),
        others_over=store.others_over,
        forget=AsyncMock(),
    )
    handler = ExpirationHandler(cast("Any", store), cast("Any", events), cast("JobRunner", parts))
    await handler.tell(notice_of("song"))
    assert [event.state for event in events.events] == ["completed"]
    parts.forget.assert_awaited_once_with("song", "f")


class CompletedBefore:
    """A store with the songs of an earlier message; ``gone``: their audio was deleted."""

    def __init__(self, *, gone: bool) -> None:
        ending = examples.completed().data.model_copy(update={"task_id": "song"})
        self.songs, self.gone = TerminalRecord(ending, "an earlier one", body="another"), gone

    async def find(self, task_id: str) -> TerminalRecord:
        return self.songs

    async def missing(self, record: TerminalRecord) -> bool:
        return self.gone

    async def commit(self, record: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        assert not self.songs.yields_to(record, instead_of)
        return self.songs


@pytest.mark.parametrize("gone", [False, True])
async def test_songs_of_an_earlier_message_answer_one_that_expired_unless_their_audio_is_gone(*, gone: bool) -> None:
    """As they do when a worker takes the message."""
    events = Recorder()
    parts = SimpleNamespace(
        exclusively=KeyedLock().of,
        rules=SimpleNamespace(worker_id="w"),
        others_over=AsyncMock(return_value=False),
        forget=AsyncMock(),
    )
    store = CompletedBefore(gone=gone)
    handler = ExpirationHandler(cast("Any", store), cast("Any", events), cast("JobRunner", parts))
    await handler.tell(notice_of("song"))
    (event,) = events.events
    assert event.state == ("expired" if gone else "completed")
    assert gone or OTHER_BODY in cast("Any", event.data).warnings
