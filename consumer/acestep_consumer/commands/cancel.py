# SPDX-License-Identifier: Apache-2.0
"""``cancel``: ask for jobs to stop, and on demand stay until they have."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from acestep_consumer.client import Client, ClientError
from acestep_consumer.commands.errors import refused
from acestep_consumer.commands.terminal import hush_libraries
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_schemas.events import JobCancelled, JobEvent, WorkerEvent


@dataclass(frozen=True, slots=True)
class CancelOptions:
    """What the flags say. ``timeout_s``: wait no longer than that; None: for ever."""

    task_ids: Sequence[str]
    wait: bool
    timeout_s: float | None
    as_json: bool


async def cancel(settings: Settings, order: CancelOptions, note: Console) -> Exit:
    """Publish the cancellations, and stay until all the jobs have ended when asked to."""
    hush_libraries()
    try:
        async with Client(settings.broker.every_url.get_secret_value()) as client:
            if order.wait:
                return await _cancel_and_wait(client, order, note)
            await _ask(client, order.task_ids)
    except ClientError as error:
        return refused(error, note)
    sys.stdout.write("".join(f"{task_id}\n" for task_id in order.task_ids))
    return Exit.DONE


async def _ask(client: Client, task_ids: Iterable[str]) -> None:
    for task_id in task_ids:
        await client.cancel(task_id)


async def _cancel_and_wait(client: Client, order: CancelOptions, note: Console) -> Exit:
    waiting = set(order.task_ids)
    # Ears first, so that no end is missed.
    async with client.subscribe(*(f"job.*.{task_id}" for task_id in waiting)) as events:
        await _ask(client, order.task_ids)
        note.print("asked; waiting for the end. Ctrl-C leaves, and the cancellation stays", style="dim")
        try:
            async with asyncio.timeout(order.timeout_s):
                others = await _follow(events, waiting, as_json=order.as_json)
        except TimeoutError:
            note.print(
                f"no end yet: {', '.join(sorted(waiting))}. The cancellation holds when they come up; what ended "
                "before it, or was never submitted, does not end again",
                style="red",
                markup=False,
                soft_wrap=True,
            )
            return Exit.JOB_FAILED
    return Exit.JOB_FAILED if others else Exit.DONE


async def _follow(events: AsyncIterator[JobEvent | WorkerEvent], waiting: set[str], *, as_json: bool) -> int:
    """Print how each job ends and take it out of ``waiting``, until that is empty. Returns how many were too late."""
    others = 0
    async for event in events:
        if not event.terminal or event.subject not in waiting:
            continue
        waiting.remove(event.subject)
        others += not isinstance(event, JobCancelled)
        sys.stdout.write((event.model_dump_json() if as_json else f"{event.subject} {event.state}") + "\n")
        if not waiting:
            break
    return others
