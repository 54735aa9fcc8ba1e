# SPDX-License-Identifier: Apache-2.0
"""Publishes terminal events of requests that the broker dead-lettered before they were done, mostly as expired."""

import hashlib
from datetime import UTC, datetime

import structlog

from acestep_consumer.broker.dead_letter_notices import DeadLetterNotice
from acestep_consumer.domain.errors import ConsumerError, Expired, ManifestUnreadable
from acestep_consumer.domain.outcome import RunInfo, TerminalRecord, outcome_of, unfinished
from acestep_consumer.domain.ports import Events, Store
from acestep_consumer.execution.runner import JobRunner

DELIVERY_LIMIT = "delivery_limit"
"""The broker's reason for a message that workers had, and gave back, too often for an operator's policy."""

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
        tried = await self._others_over(notice, task_id)
        record = await self._exclusive_record(notice, task_id, tried=tried)
        # A worker that lost the broker may have begun meanwhile: it records its attempt, then looks for our record.
        if not tried and await self._begun_meanwhile(notice, task_id):
            tried, record = True, await self._exclusive_record(notice, task_id, tried=True)
        outcome = outcome_of(record)
        if outcome.event is not None:
            await self._events.publish(outcome.event, notice.reply)
        if tried:
            await self._runner.forget(task_id, notice.fingerprint)

    async def _exclusive_record(self, notice: DeadLetterNotice, task_id: str, *, tried: bool) -> TerminalRecord:
        # A running job of this task ends first: it may belong to another message, and its songs answer this one too.
        async with self._runner.exclusively(task_id):
            return await self._record_of(notice, task_id, tried=tried)

    async def _others_over(self, notice: DeadLetterNotice, task_id: str) -> bool:
        """Wait while a worker that lost the broker makes this message's songs. Returns whether any had the message."""
        delivered = notice.reason == DELIVERY_LIMIT
        try:
            return await self._runner.others_over(task_id, notice.fingerprint, delivered=delivered)
        except ManifestUnreadable:  # nothing is found there, whoever ends it
            return True

    async def _begun_meanwhile(self, notice: DeadLetterNotice, task_id: str) -> bool:
        return await self._runner.others_over(task_id, notice.fingerprint, delivered=False, with_songs=True)

    async def _record_of(self, notice: DeadLetterNotice, task_id: str, *, tried: bool) -> TerminalRecord:
        message = notice.fingerprint
        info = RunInfo(self._runner.rules.worker_id, 1, notice.at or datetime.now(UTC))
        record = TerminalRecord(unfinished(_error(notice.reason, tried=tried), None, task_id, info), message)
        try:
            found = await self._store.find(task_id)
            if found is not None and found.answers(message, same=True) and not await self._store.missing(found):
                return found.for_body(hashlib.sha256(notice.body).hexdigest())
            in_force = await self._store.commit(record, found)
        except ManifestUnreadable as error:  # no record can be written, but the producer gets its event
            log.warning("terminal record not written", task_id=task_id, reason=str(error))
            return record
        # Songs whose audio is gone stay on record, and are nobody's end any more.
        return record if in_force == found else in_force


def _error(reason: str, *, tried: bool) -> ConsumerError:
    if reason != "expired":
        return ConsumerError(f"the broker dead-lettered the message before a worker had done it: {reason}")
    if tried:
        return Expired("its expiration passed, and the worker that had begun with it was lost")
    return Expired("it waited in the queue for longer than its expiration")
