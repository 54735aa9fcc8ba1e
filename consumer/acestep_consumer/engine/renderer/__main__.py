# SPDX-License-Identifier: Apache-2.0
"""The renderer process: ``python -m acestep_consumer.engine.renderer FD``; FD is a socket to the supervisor.

It ends when the pipe closes. Signals for the worker reach it too (a terminal's Ctrl-C, a service manager's SIGTERM); it
ignores them and leaves them to its parent, which drains first.
"""

import os
import queue
import signal
import socket
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from acestep_consumer.config.cores import encoder_count
from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.engine.framing import FrameSocket
from acestep_consumer.engine.heartbeat import heartbeat
from acestep_consumer.engine.kernel_cache import set_kernel_cache
from acestep_consumer.engine.library_imports import library_imports
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
    Alive,
    Configure,
    DeviceFound,
    FromEngine,
    Loading,
    Ready,
    ToEngine,
    Unusable,
)
from acestep_consumer.engine.renderer.checkpoints.checkpoint_check import uses_torchao

if TYPE_CHECKING:
    from acestep_consumer.engine.renderer.service import RendererService

EXIT_UNUSABLE, EXIT_DEVICE_LOST, EXIT_MISUNDERSTOOD = 3, 4, 5

_SWITCH_S: Final = 0.0005
"""Seconds for which a thread waits for the interpreter while another one computes. Python's default is 5 ms, and a
timeline of songs with times on an H200 showed the device idle for 4 to 5 ms at many steps."""

log = structlog.get_logger()


class RendererPipe:
    """Typed messages on the socket. A thread reads it, so that its end stops the process whatever else is running."""

    def __init__(self, number: int) -> None:
        self._frames = FrameSocket(socket.socket(fileno=number))
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="pipe", daemon=True).start()

    def receive(self) -> ToEngine:
        """Wait for the next message."""
        return self._inbox.get()

    def send(self, message: FromEngine) -> None:
        """Send one message."""
        try:
            self._frames.send(FROM_ENGINE.dump_json(message))
        except OSError:
            exit_now(0)

    def _read(self) -> None:
        try:
            for payload in self._frames:
                self._inbox.put(TO_ENGINE.validate_json(payload))
        except ValueError:
            log.exception("invalid message from the consumer process; are the two of different versions?")
            exit_now(EXIT_MISUNDERSTOOD)
        exit_now(0)


def main() -> None:
    """Load the models of the first message, then serve requests until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_S)
    pipe = RendererPipe(int(sys.argv[1]))
    configure = pipe.receive()
    if not isinstance(configure, Configure):
        exit_now(EXIT_MISUNDERSTOOD)
    set_up_logs(configure.log_level, "json" if configure.log_json else "console")
    with heartbeat(lambda: pipe.send(Alive())):
        service = open_service(pipe, configure)
    while True:
        service.handle(pipe.receive())


def open_service(pipe: RendererPipe, configure: Configure) -> "RendererService":
    """Load the models and report them; exit with ``EXIT_UNUSABLE`` when that can never work."""
    set_kernel_cache(configure.settings.compile_cache)
    try:
        # Not at the top: torch takes seconds and may be missing, and the parent must be informed of either.
        with library_imports(quantized=uses_torchao(configure.settings)):
            from acestep_consumer.engine.renderer.device import DeviceError, inspect  # noqa: PLC0415 - see above

            device = inspect(configure.settings)
            # Before the other packages, which take longer: the planner waits for this.
            pipe.send(DeviceFound(device=device.device, vram_gb=device.vram_gb))
            from acestep_consumer.audio.encoding.pool import EncoderPool  # noqa: PLC0415
            from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError  # noqa: PLC0415
            from acestep_consumer.engine.renderer.service import RendererService  # noqa: PLC0415
            from acestep_consumer.engine.renderer.startup import open_runtime  # noqa: PLC0415
            from acestep_consumer.policy.scoring import ScoreTableError, load_score_table  # noqa: PLC0415
    except ImportError as error:
        refuse(pipe, f"{error.name} is missing: pip install 'acestep-consumer[engine]'")
    except DeviceError as error:
        refuse(pipe, str(error))
    try:
        scores = load_score_table(configure.settings.score_table)
    except ScoreTableError as error:
        refuse(pipe, str(error))
    encoders = EncoderPool(encoder_count(configure.settings.encoders))
    encoders.start()
    try:
        with encoders.slot(lambda: False) as encode:
            runtime = open_runtime(
                configure.settings,
                lambda step, phase: pipe.send(Loading(step=step, phase=phase)),
                device_report=device,
                share_gb=configure.memory_gb,
                encode_test=encode,
            )
    except CheckpointError as error:
        refuse(pipe, str(error))
    service = RendererService(
        runtime,
        pipe.send,
        on_device_lost,
        max_input_s=configure.max_input_s,
        encoders=encoders,
        scores=scores,
    )
    pipe.send(Ready(report=replace(runtime.report, encoders=encoders.size)))
    return service


def refuse(pipe: RendererPipe, reason: str) -> NoReturn:
    """Report why this can never work, and exit."""
    pipe.send(Unusable(reason=reason))
    exit_now(EXIT_UNUSABLE)


def on_device_lost(error: BaseException) -> NoReturn:
    """End the process: every later call on the device would fail, and the supervisor starts another."""
    log.error("the device has failed for this process", exc_info=error)
    exit_now(EXIT_DEVICE_LOST)


def exit_now(code: int) -> NoReturn:
    """Exit without clean-up: threads may be deep in a kernel."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
