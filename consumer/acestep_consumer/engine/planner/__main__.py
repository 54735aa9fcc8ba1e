# SPDX-License-Identifier: Apache-2.0
"""The planner process: ``python -m acestep_consumer.engine.planner FD``; FD is a socket to the supervisor.

One event loop does everything: between two steps of the language model it reads the pipe, starts requests and answers.
As the renderer, it ends when the pipe closes and leaves signals to its parent.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

import structlog

from acestep_consumer.config.logs import set_log_level, set_up_logs
from acestep_consumer.engine import framing
from acestep_consumer.engine.heartbeat import heartbeat
from acestep_consumer.engine.kernel_cache import set_kernel_cache
from acestep_consumer.engine.library_imports import library_imports
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
    Alive,
    ConfigurePlanner,
    FromEngine,
    Loading,
    LoadModels,
    Ready,
    SetLogLevel,
    ToEngine,
    Unusable,
)
from acestep_consumer.engine.planner.registry import place_on_disk
from acestep_consumer.engine.torchao_checkpoints import quantized_by_torchao
from acestep_consumer.policy.tiers import LMS

EXIT_UNUSABLE, EXIT_BACKEND_FAILED, EXIT_MISUNDERSTOOD, EXIT_CROWDED = 3, 4, 5, 6

log = structlog.get_logger()


class PlannerPipe:
    """Typed messages on the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> ToEngine:
        """Wait for the next message; exit when the pipe closes."""
        try:
            payload = await framing.read(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            exit_now(0)
        return TO_ENGINE.validate_json(payload)

    def send(self, message: FromEngine) -> None:
        """Send one message."""
        self._writer.write(framing.pack(FROM_ENGINE.dump_json(message)))

    def beat(self) -> None:
        """Send ``Alive`` from another thread, while the event loop loads the model."""
        # A write this small is never split, and without room in the pipe there is none: it cannot part another message.
        with suppress(OSError):
            os.write(self._writer.get_extra_info("socket").fileno(), framing.pack(FROM_ENGINE.dump_json(Alive())))

    async def tell(self, message: FromEngine) -> None:
        """Send one message, and wait until it is written to the pipe."""
        self.send(message)
        with suppress(ConnectionError):
            await self._writer.drain()


async def main() -> None:
    """Load the model of the first message, then serve requests until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe = PlannerPipe(*await asyncio.open_unix_connection(sock=socket.socket(fileno=int(sys.argv[1]))))
    configure = await pipe.receive()
    if not isinstance(configure, ConfigurePlanner):
        exit_now(EXIT_MISUNDERSTOOD)
    set_up_logs(configure.log_level, "json" if configure.log_json else "console")
    await serve(pipe, configure)


async def serve(pipe: PlannerPipe, configure: ConfigurePlanner) -> None:
    """Load the model, warm it up, and answer requests."""
    set_kernel_cache(configure.compile_cache)
    with heartbeat(pipe.beat):
        try:
            # Not at the top: torch takes seconds and may be missing, and the parent must be informed of either.
            with library_imports(quantized=uses_torchao(configure)):
                from acestep_consumer.engine.planner.engine_loop import EngineLoop  # noqa: PLC0415 - see above
                from acestep_consumer.engine.planner.loading import (  # noqa: PLC0415
                    DeviceCrowded,
                    LmUnusable,
                    import_backend,
                    load,
                )
                from acestep_consumer.engine.planner.planning import SongPlanner  # noqa: PLC0415
                from acestep_consumer.engine.planner.service import PlannerService, report_stats  # noqa: PLC0415

                import_backend(configure)
        except ImportError as error:
            await refuse(pipe, f"{error.name} is missing: pip install 'acestep-consumer[engine]'")
        if configure.wait:
            await pipe.tell(Loading(step="waiting for the renderer", phase="waiting"))
            configure = await wait_for_start(pipe)
        await pipe.tell(Loading(step=f"loading {configure.model}", phase="models"))
        try:
            loaded = load(configure)
        except LmUnusable as error:
            await refuse(pipe, str(error))
        except DeviceCrowded:
            log.exception("vLLM cannot start beside the renderer")
            exit_now(EXIT_CROWDED)
        await pipe.tell(Loading(step=f"warming up {configure.model}", phase="warm-up"))
        engine_loop = EngineLoop(loaded.backend)
        stepping = asyncio.create_task(engine_loop.run(), name="steps")
        stepping.add_done_callback(on_steps_ended)
        planner = SongPlanner(engine_loop, loaded.tokens)
        await planner.warm_up()
    # All objects so far live as long as the process: the garbage collector would scan vLLM's again and again.
    gc.collect()
    gc.freeze()
    service = PlannerService(planner, pipe.send)
    pipe.send(Ready(report=loaded.report))
    stats = asyncio.create_task(report_stats(engine_loop, pipe.send), name="stats")
    while not stats.done():
        service.handle(await pipe.receive())


def uses_torchao(configure: ConfigurePlanner) -> bool:
    """Whether weights are to be quantized, or those on this disk already are: of any model that may be named later."""
    names = (configure.model, *(LMS if configure.wait else ()))
    places = (place_on_disk(name, configure.checkpoint_dir, os.environ) for name in names)
    return configure.quantization is not None or any(place and quantized_by_torchao(place) for place in places)


async def wait_for_start(pipe: PlannerPipe) -> ConfigurePlanner:
    """Wait for ``LoadModels``; returns its settings."""
    while not isinstance(message := await pipe.receive(), LoadModels):
        if isinstance(message, SetLogLevel):
            set_log_level(message.log_level)
    return message.configure


async def refuse(pipe: PlannerPipe, reason: str) -> NoReturn:
    """Report why this can never work, and exit."""
    await pipe.tell(Unusable(reason=reason))
    exit_now(EXIT_UNUSABLE)


def on_steps_ended(task: "asyncio.Task[None]") -> None:
    """End the process after the backend failed; the supervisor starts another."""
    if not task.cancelled():
        log.error("the language model's backend failed", exc_info=task.exception())
        exit_now(EXIT_BACKEND_FAILED)


def exit_now(code: int) -> NoReturn:
    """Exit without clean-up: the device's memory is freed with the process."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    asyncio.run(main())
