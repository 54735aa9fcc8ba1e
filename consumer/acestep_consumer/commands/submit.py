# SPDX-License-Identifier: Apache-2.0
"""``submit``: publish one request and say what it can expect; on demand wait with a progress bar, and download."""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from acestep_consumer.client import Client, ClientError, DownloadFailed, Job, Outlook
from acestep_consumer.commands.errors import refused
from acestep_consumer.commands.terminal import hush_libraries, seconds
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_schemas.events import JobCompleted, JobProgress, JobStarted, TerminalEvent


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What the flags say."""

    body: Mapping[str, object]
    priority: int
    wait: bool
    download: Path | None
    as_json: bool


async def submit(settings: Settings, order: SubmitOptions, note: Console) -> Exit:
    """Publish, and stay until the job ends when asked to."""
    hush_libraries()
    try:
        async with Client(settings.broker.every_url.get_secret_value(), storage=settings.storage) as client:
            if order.wait:
                job = await client.start(order.body, priority=order.priority)
                return await _stay(client, job, order, note)
            task_id = await client.submit(order.body, priority=order.priority)
            await _leave(client, task_id, order, note)
    except ClientError as error:
        return refused(error, note)
    return Exit.DONE


async def _leave(client: Client, task_id: str, order: SubmitOptions, note: Console) -> None:
    """Print the id, and what the request can expect where somebody reads it: a script's loop is not kept waiting."""
    if order.as_json:
        try:
            outlook = await client.outlook()
        except asyncio.CancelledError:
            note.print(f"accepted as {task_id}", markup=False, soft_wrap=True)
            raise
        sys.stdout.write(json.dumps({"task_id": task_id, **asdict(outlook)}) + "\n")
        return
    sys.stdout.write(task_id + "\n")
    sys.stdout.flush()
    if note.is_terminal:
        note.print(in_words(await client.outlook()), style="dim", markup=False, soft_wrap=True)


async def _stay(client: Client, job: Job, order: SubmitOptions, note: Console) -> Exit:
    note.print(f"accepted as {job.task_id}", markup=False, soft_wrap=True)
    try:
        note.print(in_words(await client.outlook()), style="dim", markup=False, soft_wrap=True)
        event = await _follow(job, note)
    except asyncio.CancelledError:
        note.print(f"the job goes on; `acestep-consumer watch {job.task_id}` follows it", markup=False, soft_wrap=True)
        raise
    if order.as_json:
        sys.stdout.write(event.model_dump_json() + "\n")
    if not isinstance(event, JobCompleted):
        note.print(
            f"{event.data.status}: {event.data.error.code}: {event.data.error.message}",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return Exit.JOB_FAILED
    _tell(event, note)
    return await _download(job, order.download, note) if order.download and event.data.audios else Exit.DONE


def in_words(outlook: Outlook) -> str:
    """Return what can be expected as one line, such as ``number 3 in the queue; songs in about 40 s (2 workers)``."""
    parts = []
    if outlook.position is not None:
        parts.append(f"number {outlook.position:,} in the queue" if outlook.position else "in a worker's hands")
    if outlook.expected_s is not None:
        workers = "1 worker" if outlook.workers == 1 else f"{outlook.workers:,} workers"
        jobs = "1 job" if outlook.in_hand == 1 else f"{outlook.in_hand or 0:,} jobs"
        parts.append(f"songs in about {seconds(outlook.expected_s)} ({workers}, {jobs} in hand)")
    if outlook.note is not None:
        parts.append(outlook.note)
    return "; ".join(parts)


async def _follow(job: Job, note: Console) -> TerminalEvent:
    """Draw the bar until the terminal event."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=note) as bar:
        task = bar.add_task("queued", total=1.0)
        async for event in job.events():
            match event:
                case JobStarted():
                    bar.update(task, description="started")
                case JobProgress(data=data):
                    bar.update(task, completed=data.progress, description=data.stage)
                case _:
                    bar.update(task, completed=1.0, description=event.data.status)
    return await job.wait()


def _tell(event: JobCompleted, note: Console) -> None:
    data = event.data
    for change in data.policy.adjustments:
        note.print(
            f"adjusted {change.field}: {change.requested} -> {change.applied} ({change.reason})",
            markup=False,
            soft_wrap=True,
        )
    for warning in data.warnings:
        note.print(f"warning: {warning}", markup=False, soft_wrap=True)
    for audio in data.audios:
        note.print(f"{audio.uri}  {audio.duration_s:g} s  seed {audio.seed}", markup=False, soft_wrap=True)


async def _download(job: Job, folder: Path, note: Console) -> Exit:
    try:
        for path in await job.result(folder):
            note.print(f"saved {path}", markup=False, soft_wrap=True)
    except DownloadFailed as error:
        note.print(f"download: {error}", style="red", markup=False, soft_wrap=True)
        return Exit.UNREACHABLE
    return Exit.DONE
