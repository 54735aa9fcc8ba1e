# SPDX-License-Identifier: Apache-2.0
"""Puts down how a message came to its end: who worked on it, on which try, when, and what went wrong."""

from collections.abc import Awaitable
from datetime import UTC, datetime

import structlog

from acestep_consumer.case import Case
from acestep_consumer.ending import Ending
from acestep_consumer.errors import ConsumerError, Interrupted
from acestep_consumer.outcome import Scene, known, unfinished
from acestep_schemas.events import Unfinished

log = structlog.get_logger()


class Witness:
    """Speaks for one worker."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def scene(self, case: Case) -> Scene:
        """Return who works on the message, on which try, now."""
        return Scene(self._worker_id, case.number, datetime.now(UTC))

    async def end_of(self, work: Awaitable[Ending], case: Case, task_id: str) -> Ending:
        """Return what ``work`` returns, or what its error says. Interruption and cancellation pass: no end yet."""
        try:
            return await work
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke, the producer hears of it
            return self.without_songs(error, case, task_id)

    def without_songs(self, error: Exception, case: Case, task_id: str) -> Unfinished:
        """Return how the task ended because of ``error``, which is logged: the text of a bug is for the log alone."""
        ours = known(error)
        if type(ours) is ConsumerError:
            log.error("job broke on a bug", exc_info=error)
        else:
            log.warning("job not done", code=str(ours.code), reason=str(ours))
        return unfinished(ours, case.job, task_id, self.scene(case))
