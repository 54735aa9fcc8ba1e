# SPDX-License-Identifier: Apache-2.0
"""The renderer process: ``python -m acestep_consumer.engine.renderer FD``; FD is a socket to the supervisor.

It lives as long as the pipe. Signals meant for the worker reach it too (a terminal's Ctrl-C, a service manager's
SIGTERM); it leaves them to its parent, which drains first.
"""

import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import structlog

from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.engine.framing import FrameSocket
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
    Configure,
    FromEngine,
    Loading,
    Ready,
    ToEngine,
    Unusable,
)

if TYPE_CHECKING:
    from acestep_consumer.engine.renderer.service import RendererService

EXIT_UNUSABLE, EXIT_DEVICE_LOST, EXIT_MISUNDERSTOOD = 3, 4, 5

log = structlog.get_logger()


class RendererPipe:
    """Typed messages on the socket. Its end is noticed at once, whatever the main thread does, and ends the process."""

    def __init__(self, number: int) -> None:
        self._frames = FrameSocket(socket.socket(fileno=number))
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="pipe", daemon=True).start()

    def hear(self) -> ToEngine:
        """Wait for the next message."""
        return self._inbox.get()

    def say(self, message: FromEngine) -> None:
        """Send one message."""
        try:
            self._frames.send(FROM_ENGINE.dump_json(message))
        except OSError:
            leave(0)

    def _read(self) -> None:
        try:
            for payload in self._frames:
                self._inbox.put(TO_ENGINE.validate_json(payload))
        except ValueError:
            log.exception("message not understood: the two processes are of different versions")
            leave(EXIT_MISUNDERSTOOD)
        leave(0)


def main() -> None:
    """Load what the first message says, then serve until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe = RendererPipe(int(sys.argv[1]))
    configure = pipe.hear()
    assert isinstance(configure, Configure)  # noqa: S101 - the supervisor's first message
    set_up_logs(configure.log_level, "json" if configure.log_json else "console")
    service = open_service(pipe, configure)
    while True:
        service.take(pipe.hear())


def open_service(pipe: RendererPipe, configure: Configure) -> "RendererService":
    """Load the models and tell what there is; leave when that can never work."""
    keep_kernels(configure.settings.compile_cache)
    try:
        # Not at the top: torch takes seconds and may be missing, and the parent must hear of either.
        from acestep_consumer.engine.renderer.device import DeviceError  # noqa: PLC0415 - see above
        from acestep_consumer.engine.renderer.registry import CheckpointError  # noqa: PLC0415
        from acestep_consumer.engine.renderer.service import RendererService  # noqa: PLC0415
        from acestep_consumer.engine.renderer.startup import open_studio  # noqa: PLC0415
    except ImportError as error:
        pipe.say(Unusable(reason=f"{error.name} is missing: pip install 'acestep-consumer[engine]'"))
        leave(EXIT_UNUSABLE)
    try:
        studio = open_studio(
            configure.settings, lambda what: pipe.say(Loading(what=what)), share_gb=configure.memory_gb
        )
    except (DeviceError, CheckpointError) as error:
        pipe.say(Unusable(reason=str(error)))
        leave(EXIT_UNUSABLE)
    service = RendererService(studio, pipe.say, lost, max_input_s=configure.max_input_s)
    pipe.say(Ready(report=studio.report))
    return service


def keep_kernels(folder: Path | None) -> None:
    """Have torch keep what it compiles, so that the next start need not compile again. Before torch is imported."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder or cache / "acestep-consumer" / "kernels"))


def lost(error: BaseException) -> NoReturn:
    """The device fails every later call in this process: let the supervisor start another."""
    log.error("the device is lost to this process", exc_info=error)
    leave(EXIT_DEVICE_LOST)


def leave(code: int) -> NoReturn:
    """End now: threads may be deep in a kernel, and nothing here is worth a clean-up."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
