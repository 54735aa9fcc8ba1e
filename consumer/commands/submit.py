# SPDX-License-Identifier: Apache-2.0
"""``submit``: publish one request; on demand wait with a progress bar, and download what was sung."""

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from consumer.client import Client, ClientError, DownloadFailed, Job
from consumer.commands.exits import Exit, refused
from consumer.settings import Settings
from schemas.events import JobCompleted, JobProgress, JobStarted, TerminalEvent


@dataclass(frozen=True, slots=True)
class Submission:
    """What the flags say."""

    body: Mapping[str, object]
    priority: int
    wait: bool
    download: Path | None
    as_json: bool


async def submit(settings: Settings, order: Submission, note: Console) -> Exit:
    """Publish, and stay until the job ends when asked to."""
    try:
        async with Client(settings.broker.url.get_secret_value(), storage=settings.storage) as client:
            if order.wait:
                job = await client.start(order.body, priority=order.priority)
                return await _stay(job, order, note)
            task_id = await client.submit(order.body, priority=order.priority)
    except ClientError as error:
        return refused(error, note)
    sys.stdout.write(task_id + "\n")
    return Exit.DONE


async def _stay(job: Job, order: Submission, note: Console) -> Exit:
    note.print(f"accepted as {job.task_id}", markup=False)
    try:
        event = await _follow(job, note)
    except asyncio.CancelledError:
        note.print(f"the job goes on; `acestep-consumer watch {job.task_id}` follows it", markup=False)
        raise
    if order.as_json:
        sys.stdout.write(event.model_dump_json() + "\n")
    if not isinstance(event, JobCompleted):
        note.print(
            f"{event.data.status}: {event.data.error.code}: {event.data.error.message}", style="red", markup=False
        )
        return Exit.JOB_FAILED
    _tell(event, note)
    return await _download(job, order.download, note) if order.download and event.data.audios else Exit.DONE


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
        note.print(f"adjusted {change.field}: {change.requested} -> {change.applied} ({change.reason})", markup=False)
    for warning in data.warnings:
        note.print(f"warning: {warning}", markup=False)
    for audio in data.audios:
        note.print(f"{audio.uri}  {audio.duration_s:g} s  seed {audio.seed}", markup=False)


async def _download(job: Job, folder: Path, note: Console) -> Exit:
    try:
        for path in await job.result(folder):
            note.print(f"saved {path}", markup=False)
    except DownloadFailed as error:
        note.print(f"download: {error}", style="red", markup=False)
        return Exit.UNREACHABLE
    return Exit.DONE
