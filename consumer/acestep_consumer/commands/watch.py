# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer watch`: prints events as they arrive."""

import sys
from collections.abc import AsyncIterator

from rich.console import Console

from acestep_consumer.client import Client, ClientError
from acestep_consumer.commands.base import print_client_error
from acestep_consumer.commands.terminal import BROKER, silence_amqp_libraries, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_schemas.events import JobCompleted, JobEvent, JobProgress, JobStarted, WorkerEvent


async def watch(settings: Settings, task_id: str | None, note: Console, *, as_json: bool) -> Exit:
    """Print events until Ctrl-C, or of one job until it ends; a job that has ended already prints its last event."""
    silence_amqp_libraries()
    try:
        with waiting_for(BROKER, note) as connected:
            async with Client(settings.broker.every_url.get_secret_value(), storage=settings.storage) as client:
                if task_id:
                    job = await client.job(task_id)
                    connected()
                    await _print(job.events(), note, as_json=as_json)
                else:
                    async with client.subscribe() as events:
                        connected()
                        await _print(events, note, as_json=as_json)
    except ClientError as error:
        return print_client_error(error, note)
    return Exit.DONE


async def _print(events: AsyncIterator[JobEvent | WorkerEvent], note: Console, *, as_json: bool) -> None:
    note.print("watching events; press Ctrl-C to stop", style="dim")
    states: dict[str, str] = {}
    async for event in events:
        if isinstance(event, WorkerEvent) and not as_json:
            if states.get(event.data.worker_id) == event.data.state:
                continue  # an answer to somebody's status request, or another prefetch: not in the line
            states[event.data.worker_id] = event.data.state
        sys.stdout.write((event.model_dump_json() if as_json else _line(event)) + "\n")
        sys.stdout.flush()


def _line(event: JobEvent | WorkerEvent) -> str:
    when = event.time.astimezone().strftime("%H:%M:%S")
    if isinstance(event, WorkerEvent):
        return f"{when}  worker {event.data.worker_id} is {event.data.state}"
    return f"{when}  {event.subject}  {event.state}{_more(event)}"


def _more(event: JobEvent) -> str:
    match event:
        case JobStarted():
            return ""
        case JobProgress(data=data):
            return f" {data.progress:.0%} {data.stage}"
        case JobCompleted(data=data):
            return "".join(f" {audio.uri}" for audio in data.audios)
    error = event.data.error
    # The code of a cancelled job is "cancelled", as its state.
    return f": {error.message}" if str(error.code) == str(event.state) else f" {error.code}: {error.message}"
