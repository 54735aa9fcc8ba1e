# SPDX-License-Identifier: Apache-2.0
"""Events onto the board, a look into storage for jobs whose events were missed, and how the broker is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final

from acestep_consumer.client import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.webui.job_board import JobBoard, QueueState
from acestep_schemas.events import JobCompleted, JobEvent, TerminalEvent, WorkerEvent

# A worker tells of progress twice a second; a job that waits tells nothing, and asking costs one small request.
SILENT_S: Final = 60.0
LOOK_EVERY_S: Final = 30.0
# People notice within seconds that nothing moves; it is one small question to the broker.
FEEL_EVERY_S: Final = 2.0


async def report(events: AsyncIterator[JobEvent | WorkerEvent], board: JobBoard) -> None:
    """Put events up as they come, for as long as they come."""
    async for event in events:
        if not isinstance(event, WorkerEvent):
            board.hear(event)


async def catch_up(board: JobBoard, endings: Results) -> None:
    """Look every half minute whether jobs that have gone silent have ended: a long cut may have cost their events."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        for card in board.silent(SILENT_S):
            with suppress(DownloadFailed):  # storage may be away; the next round asks again
                ending = await endings.find(card.task_id)
                if ending is not None and _is_about(ending, card.since.timestamp()):
                    board.hear(ending)


async def feel(look: Callable[[], Awaitable[QueueState]], board: JobBoard) -> None:
    """Tell the board again and again how broker and workers are."""
    while True:
        board.feel(await look())
        await asyncio.sleep(FEEL_EVERY_S)


def _is_about(ending: TerminalEvent, since: float) -> bool:
    """An end without songs that is older than the request belongs to an earlier one of the same id."""
    return isinstance(ending, JobCompleted) or ending.time.timestamp() >= since
