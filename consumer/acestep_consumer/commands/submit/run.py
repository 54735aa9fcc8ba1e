# SPDX-License-Identifier: Apache-2.0
"""Publishes one request and prints its position and expected time; waits and downloads on demand."""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from acestep_consumer.client import Client, ClientError, DownloadFailed, Job, Outlook
from acestep_consumer.commands.base import print_client_error, print_error, print_unwritable, print_warning
from acestep_consumer.commands.terminal import BROKER, about, plural, silence_amqp_libraries, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_schemas.events import JobCompleted, JobProgress, JobStarted, TerminalEvent


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """The request and the options. ``expires_s``: longest wait in the queue; ``timeout_s``: for the result; seconds."""

    body: Mapping[str, object]
    priority: int
    expires_s: float | None
    wait: bool
    timeout_s: float | None
    download: Path | None
    as_json: bool


async def submit(settings: Settings, options: SubmitOptions, note: Console) -> Exit:
    """Publish the request; with ``wait``, follow the job until it ends."""
    silence_amqp_libraries()
    try:
        with waiting_for(BROKER, note) as accepted:
            async with Client(settings.broker.every_url.get_secret_value(), storage=settings.storage) as client:
                if options.wait:
                    job = await client.start(options.body, priority=options.priority, expiration_s=options.expires_s)
                    accepted()
                    return await _wait(client, job, options, note)
                task_id = await client.submit(options.body, priority=options.priority, expiration_s=options.expires_s)
                accepted()
                await _report_accepted(client, task_id, options, note)
    except ClientError as error:
        return print_client_error(error, note)
    return Exit.DONE


async def _report_accepted(client: Client, task_id: str, options: SubmitOptions, note: Console) -> None:
    """Print the id, and on a terminal the estimate: a script that submits many is not kept waiting for it."""
    if options.as_json:
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


async def _wait(client: Client, job: Job, options: SubmitOptions, note: Console) -> Exit:
    note.print(f"accepted as {job.task_id}", markup=False, soft_wrap=True)
    try:
        note.print(in_words(await client.outlook()), style="dim", markup=False, soft_wrap=True)
        async with asyncio.timeout(options.timeout_s):
            event = await _follow(job, note)
    except TimeoutError:
        print_error(f"no result within {options.timeout_s:g} s", note)
        _print_how_to_follow(job, note)
        return Exit.JOB_FAILED
    except asyncio.CancelledError:
        _print_how_to_follow(job, note)
        raise
    if options.as_json:
        sys.stdout.write(event.model_dump_json() + "\n")
    if not isinstance(event, JobCompleted):
        error = event.data.error
        # The code of a cancelled job is "cancelled".
        code = "" if str(error.code) == event.data.status else f" ({error.code})"
        print_error(f"job {event.data.status}{code}: {error.message}", note)
        return Exit.JOB_FAILED
    _print_result(event, note)
    return await _download(job, options.download, note) if options.download and event.data.audios else Exit.DONE


def _print_how_to_follow(job: Job, note: Console) -> None:
    note.print(
        f"The job is not cancelled. Follow it with: acestep-consumer watch {job.task_id}", markup=False, soft_wrap=True
    )


def in_words(outlook: Outlook) -> str:
    """Return an estimate as one line: ``position 3 in the queue; songs in about 40 s (…)``."""
    parts = []
    if outlook.position is not None:
        parts.append(f"position {outlook.position:,} in the queue" if outlook.position else "taken by a worker")
    if outlook.expected_s is not None:
        jobs = f"{plural(outlook.workers or 0, 'worker')}, {plural(outlook.in_hand or 0, 'job')} in progress"
        parts.append(f"songs in {about(outlook.expected_s)} ({jobs})")
    if outlook.note is not None:
        parts.append(outlook.note)
    return "; ".join(parts)


async def _follow(job: Job, note: Console) -> TerminalEvent:
    """Show a progress bar until the terminal event, and return that."""
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
                    bar.update(task, completed=1.0, description=str(event.state))
    return await job.wait()


def _print_result(event: JobCompleted, note: Console) -> None:
    data = event.data
    for change in data.policy.adjustments:
        note.print(
            f"adjusted {change.field} from {change.requested} to {change.applied}: {change.reason}",
            markup=False,
            soft_wrap=True,
        )
    for warning in data.warnings:
        print_warning(warning, note)
    for each in data.candidates:
        score = "could not be decoded" if each.score is None else f"score {each.score:.2f}"
        kept = "not kept" if each.index is None else f"kept as {each.index}"
        note.print(f"candidate with seed {each.seed}: {score}, {kept}", markup=False, soft_wrap=True)
    for audio in data.audios:
        note.print(f"{audio.uri}  {audio.duration_s:g} s  seed {audio.seed}", markup=False, soft_wrap=True)


async def _download(job: Job, folder: Path, note: Console) -> Exit:
    try:
        for path in await job.result(folder):
            note.print(f"saved {path}", markup=False, soft_wrap=True)
    except DownloadFailed as error:
        print_error(f"download failed: {error}", note)
        return Exit.UNREACHABLE
    except OSError as error:
        return print_unwritable(folder, error, note)
    return Exit.DONE
