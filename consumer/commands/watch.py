# SPDX-License-Identifier: Apache-2.0
"""``watch``: events as they come."""

import sys

from rich.console import Console

from consumer.client import Client, ClientError
from consumer.commands.exits import Exit, refused
from consumer.settings import Settings
from schemas.events import JobEvent, JobProgress, WorkerEvent


async def watch(settings: Settings, task_id: str | None, note: Console, *, as_json: bool) -> Exit:
    """Print events until Ctrl-C, or until the one job that was asked for ends."""
    keys = (f"job.*.{task_id}",) if task_id else ("job.#", "worker.#")
    try:
        async with Client(settings.broker.url.get_secret_value()) as client, client.subscribe(*keys) as events:
            note.print("watching; Ctrl-C ends", style="dim")
            async for event in events:
                sys.stdout.write((event.model_dump_json() if as_json else _line(event)) + "\n")
                sys.stdout.flush()
                if task_id and not isinstance(event, WorkerEvent) and event.state.terminal:
                    break
    except ClientError as error:
        return refused(error, note)
    return Exit.DONE


def _line(event: JobEvent | WorkerEvent) -> str:
    when = event.time.astimezone().strftime("%H:%M:%S")
    if isinstance(event, WorkerEvent):
        return f"{when}  worker {event.data.worker_id} is {event.data.state}"
    return f"{when}  {event.subject}  {event.state}{_more(event)}"


def _more(event: JobEvent) -> str:
    if isinstance(event, JobProgress):
        return f" {event.data.progress:.0%} {event.data.stage}"
    if event.state == "completed":
        return "".join(f" {audio['uri']}" for audio in event.data.model_dump()["audios"])
    error = event.data.model_dump().get("error")
    return f" {error['code']}: {error['message']}" if error else ""
