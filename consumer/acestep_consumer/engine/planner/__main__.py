# SPDX-License-Identifier: Apache-2.0
"""The planner process: ``python -m acestep_consumer.engine.planner FD``, started by the supervisor with a socket as FD.

One event loop does it all: between two steps of the language model it reads the pipe, starts newcomers and answers.
As with the renderer, the pipe's end is the signal to leave, and other signals are left to the parent.
"""

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

import structlog

from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.engine import framing
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
    ConfigurePlanner,
    FromEngine,
    Loading,
    Ready,
    ToEngine,
    Unusable,
)

EXIT_UNUSABLE, EXIT_ENGINE_DEAD = 3, 4

log = structlog.get_logger()


class PlannerPipe:
    """Typed messages on the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def hear(self) -> ToEngine:
        """Wait for the next message; leave when the parent is gone."""
        try:
            payload = await framing.read(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            leave(0)
        return TO_ENGINE.validate_json(payload)

    def say(self, message: FromEngine) -> None:
        """Send one message."""
        self._writer.write(framing.pack(FROM_ENGINE.dump_json(message)))

    async def flush(self) -> None:
        """Wait until everything said has left."""
        with suppress(ConnectionError):
            await self._writer.drain()


async def main() -> None:
    """Load what the first message says, then serve until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe = PlannerPipe(*await asyncio.open_unix_connection(sock=socket.socket(fileno=int(sys.argv[1]))))
    configure = await pipe.hear()
    assert isinstance(configure, ConfigurePlanner)  # noqa: S101 - the supervisor's first message
    set_up_logs(configure.log_level, "json" if configure.log_json else "console")
    await serve(pipe, configure)


async def serve(pipe: PlannerPipe, configure: ConfigurePlanner) -> None:
    """Load the model and have orders written."""
    pipe.say(Loading(what=f"loading {configure.model}"))
    await pipe.flush()
    try:
        # Not at the top: torch takes seconds and may be missing, and the parent must hear of either.
        from acestep_consumer.engine.planner.engine_loop import EngineLoop  # noqa: PLC0415 - see above
        from acestep_consumer.engine.planner.loading import LmUnusable, load  # noqa: PLC0415
        from acestep_consumer.engine.planner.planning import SongPlanner  # noqa: PLC0415
        from acestep_consumer.engine.planner.service import PlannerService  # noqa: PLC0415
    except ImportError as error:
        await refuse(pipe, f"{error.name} is missing: pip install 'acestep-consumer[engine]'")
    try:
        loaded = load(configure)
    except LmUnusable as error:
        await refuse(pipe, str(error))
    desk = EngineLoop(loaded.backend)
    stepping = asyncio.create_task(desk.run(), name="steps")
    stepping.add_done_callback(on_steps_ended)
    writer = SongPlanner(desk, loaded.tokens)
    await writer.warm_up()
    service = PlannerService(writer, pipe.say)
    pipe.say(Ready(report=loaded.report))
    while True:
        service.take(await pipe.hear())


async def refuse(pipe: PlannerPipe, reason: str) -> NoReturn:
    """Say why this can never work, and leave."""
    pipe.say(Unusable(reason=reason))
    await pipe.flush()
    leave(EXIT_UNUSABLE)


def on_steps_ended(task: "asyncio.Task[None]") -> None:
    """The backend died: let the supervisor start another process."""
    if not task.cancelled():
        log.error("the language model's engine died", exc_info=task.exception())
        leave(EXIT_ENGINE_DEAD)


def leave(code: int) -> NoReturn:
    """End now: the device frees what it holds with the process."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    asyncio.run(main())
