# SPDX-License-Identifier: Apache-2.0
"""Dead-letter notices: each gets its event, also where no record of it can be written."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import AsyncMock

from acestep_consumer.broker.dead_letter_notices import DeadLetterNotice
from acestep_consumer.concurrency.locks import KeyedLock
from acestep_consumer.domain.errors import ManifestUnreadable
from acestep_consumer.domain.ports import BodyFormat, Reply
from acestep_consumer.worker.expirations import ExpirationHandler

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


async def test_a_request_whose_manifest_is_something_else_gets_its_event_once() -> None:
    """Its notice would come back every few seconds otherwise, and hold the others up."""
    events = Recorder()
    rules = SimpleNamespace(worker_id="w")
    parts = SimpleNamespace(exclusively=KeyedLock().of, rules=rules, others_over=unreadable, forget=AsyncMock())
    runner = cast("JobRunner", parts)
    handler = ExpirationHandler(cast("Any", ForeignObjects()), cast("Any", events), runner)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    notice = DeadLetterNotice(
        body=b"{}",
        message_id="song",
        body_format=BodyFormat(),
        reply=Reply(),
        reason="expired",
        at=now,
        queue="q",
        fingerprint="f",
    )
    await handler.tell(notice)
    assert [(event.state, event.data.task_id) for event in events.events] == [("expired", "song")]
