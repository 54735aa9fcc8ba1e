# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer cancel`: sends cancellations, and waits for the jobs to end on demand."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from acestep_consumer.client import Client, ClientError
from acestep_consumer.commands.base import print_client_error, print_error
from acestep_consumer.commands.terminal import BROKER, plural, silence_amqp_libraries, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_schemas.events import JobCancelled, JobEvent, WorkerEvent


@dataclass(frozen=True, slots=True)
class CancelOptions:
    """Arguments of ``cancel``. ``timeout_s``: longest wait in seconds; None: no limit."""

    task_ids: Sequence[str]
    wait: bool
    timeout_s: float | None
    as_json: bool


async def cancel(settings: Settings, options: CancelOptions, note: Console) -> Exit:
    """Publish the cancellations; with ``wait``, stay until all the jobs have ended."""
    silence_amqp_libraries()
    try:
        with waiting_for(BROKER, note) as answered:
            async with Client(settings.broker.every_url.get_secret_value()) as client:
                if options.wait:
                    return await _cancel_and_wait(client, options, note, answered)
                await _publish(client, options.task_ids)
    except ClientError as error:
        return print_client_error(error, note)
    sys.stdout.write("".join(f"{task_id}\n" for task_id in options.task_ids))
    sys.stdout.flush()
    sent = plural(len(options.task_ids), "cancellation")
    note.print(
        f"{sent} sent. Whether such a job exists was not checked; --wait shows how it ends", style="dim", soft_wrap=True
    )
    return Exit.DONE


async def _publish(client: Client, task_ids: Iterable[str]) -> None:
    for task_id in task_ids:
        await client.cancel(task_id)


async def _cancel_and_wait(client: Client, options: CancelOptions, note: Console, answered: Callable[[], None]) -> Exit:
    waiting = set(options.task_ids)
    # Subscribed before the cancellations are sent, so that no event is missed.
    async with client.subscribe(*(f"job.*.{task_id}" for task_id in waiting)) as events:
        await _publish(client, options.task_ids)
        answered()
        note.print("Cancellation sent; waiting (Ctrl-C only stops waiting)", style="dim")
        try:
            async with asyncio.timeout(options.timeout_s):
                others = await _follow(events, waiting, as_json=options.as_json)
        except TimeoutError:
            for task_id in sorted(waiting):
                print_error(
                    f"{task_id}: no terminal event within {options.timeout_s:g} s. It may have ended earlier or not "
                    "exist; the cancellation stays valid for 7 days",
                    note,
                )
            return Exit.JOB_FAILED
    return Exit.JOB_FAILED if others else Exit.DONE


async def _follow(events: AsyncIterator[JobEvent | WorkerEvent], waiting: set[str], *, as_json: bool) -> int:
    """Print each terminal event and remove its job from ``waiting`` until that is empty.

    Returns how many jobs ended otherwise than cancelled.
    """
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
