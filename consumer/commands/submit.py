# SPDX-License-Identifier: Apache-2.0
"""``submit``: publish one request; on demand wait with a progress bar, and download what was sung."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from consumer.client import Client, ClientError
from consumer.commands.exits import Exit, refused
from consumer.errors import StorageUnavailable
from consumer.s3 import Place, S3Connection
from consumer.settings import Settings
from schemas.events import Audio, JobCompleted, JobEvent, JobProgress, JobStarted, TerminalEvent, WorkerEvent


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
        async with Client(settings.broker.url.get_secret_value()) as client:
            if order.wait:
                return await _submit_and_wait(client, settings, order, note)
            task_id = await client.submit(order.body, priority=order.priority)
    except ClientError as error:
        return refused(error, note)
    sys.stdout.write(task_id + "\n")
    return Exit.DONE


async def _submit_and_wait(client: Client, settings: Settings, order: Submission, note: Console) -> Exit:
    task_id = str(order.body.get("task_id") or uuid4())
    async with client.subscribe(f"job.*.{task_id}") as events:
        await client.submit({**order.body, "task_id": task_id}, priority=order.priority)
        note.print(f"accepted as {task_id}", markup=False)
        event = await _follow(events, note)
    if order.as_json:
        sys.stdout.write(event.model_dump_json() + "\n")
    if not isinstance(event, JobCompleted):
        note.print(
            f"{event.data.status}: {event.data.error.code}: {event.data.error.message}", style="red", markup=False
        )
        return Exit.JOB_FAILED
    _tell(event, note)
    return await _download(settings, event, order.download, note) if order.download else Exit.DONE


async def _follow(events: AsyncIterator[JobEvent | WorkerEvent], note: Console) -> TerminalEvent:
    """Draw the bar until the terminal event."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=note) as bar:
        task = bar.add_task("queued", total=1.0)
        async for event in events:
            match event:
                case JobStarted():
                    bar.update(task, description="started")
                case JobProgress(data=data):
                    bar.update(task, completed=data.progress, description=data.stage)
                case WorkerEvent():
                    pass
                case _:
                    bar.update(task, completed=1.0, description=event.data.status)
                    return event
    raise ClientError("the event stream ended before the job did; `acestep-consumer watch` picks it up again")


def _tell(event: JobCompleted, note: Console) -> None:
    data = event.data
    for change in data.policy.adjustments:
        note.print(f"adjusted {change.field}: {change.requested} -> {change.applied} ({change.reason})", markup=False)
    for warning in data.warnings:
        note.print(f"warning: {warning}", markup=False)
    for audio in data.audios:
        note.print(f"{audio.uri}  {audio.duration_s:g} s  seed {audio.seed}", markup=False)


async def _download(settings: Settings, event: JobCompleted, folder: Path, note: Console) -> Exit:
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    try:
        async with S3Connection(settings.storage) as connection:
            for audio in event.data.audios:
                path = folder / f"{event.data.task_id}-{Path(audio.uri).name}"
                await _save(connection, audio, path)
                note.print(f"saved {path}", markup=False)
    except StorageUnavailable as error:
        note.print(f"download: {error}", style="red", markup=False)
        return Exit.UNREACHABLE
    return Exit.DONE


async def _save(connection: S3Connection, audio: Audio, path: Path) -> None:
    """Download one song beside its place, compare its checksum, then move it there."""
    bucket, _, key = audio.uri.removeprefix("s3://").partition("/")
    partial = path.with_suffix(path.suffix + ".part")

    async def receive(chunks: AsyncIterator[bytes]) -> None:
        digest = hashlib.sha256()
        with partial.open("wb") as file:
            async for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != audio.sha256:
            raise StorageUnavailable(f"{audio.uri} does not have the sha256 that the event names")

    await connection.receive(Place(bucket, key), receive)
    partial.replace(path)
