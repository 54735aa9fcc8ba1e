# SPDX-License-Identifier: Apache-2.0
"""Publishes terminal events of requests that the broker dead-lettered before a worker had them, mostly as expired."""

from datetime import UTC, datetime

import structlog

from acestep_consumer.broker.dead_letter_notices import DeadLetterNotice
from acestep_consumer.domain.errors import ConsumerError, Expired, ManifestUnreadable
from acestep_consumer.domain.outcome import RunInfo, TerminalRecord, outcome_of, unfinished
from acestep_consumer.domain.ports import Events, Store
from acestep_consumer.execution.runner import JobRunner

log = structlog.get_logger()


class ExpirationHandler:
    """Writes the terminal record of such a task and publishes its event."""

    def __init__(self, store: Store, events: Events, runner: JobRunner) -> None:
        self._store = store
        self._events = events
        self._runner = runner

    async def tell(self, notice: DeadLetterNotice) -> None:
        """Publish the terminal event, the same one again if need be. Raises ``Unpublished``."""
        task_id = notice.task_id
        if task_id is None:
            raise ValueError("a notice without an id has no task")
        # A running job of this task ends first: it may belong to another message, and its songs answer this one too.
        async with self._runner.exclusively(task_id):
            outcome = outcome_of(await self._record_of(notice, task_id))
        if outcome.event is not None:
            await self._events.publish(outcome.event, notice.reply)

    async def _record_of(self, notice: DeadLetterNotice, task_id: str) -> TerminalRecord:
        message = notice.fingerprint
        info = RunInfo(self._runner.rules.worker_id, 1, notice.at or datetime.now(UTC))
        record = TerminalRecord(unfinished(_error(notice.reason), None, task_id, info), message)
        try:
            found = await self._store.find(task_id)
            if found is not None and found.answers(message, same=True):
                return found
            return await self._store.commit(record, found)
        except ManifestUnreadable as error:  # no record can be written, but the producer gets its event
            log.warning("terminal record not written", task_id=task_id, reason=str(error))
            return record


def _error(reason: str) -> ConsumerError:
    if reason == "expired":
        return Expired("it waited in the queue for longer than its expiration")
    return ConsumerError(f"the broker dead-lettered the message before a worker had it: {reason}")
