# SPDX-License-Identifier: Apache-2.0
"""Signals of a worker: SIGTERM and SIGINT drain it, a second one stops it at once; SIGHUP reloads the settings."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import structlog

from acestep_consumer.multi_gpu.parent_pipe import Terminal, mute

T = TypeVar("T")

log = structlog.get_logger()


class Signals:
    """Handles signals, and remembers whether to stop.

    Args:
        on_reload: called on a SIGHUP that an operator sent.

    Attributes:
        stop: set by the first signal to stop.
        hurry: set by the second.
    """

    def __init__(self, on_reload: Callable[[], None]) -> None:
        self._on_reload = on_reload
        self._terminal = Terminal()
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals in the body. A SIGHUP that is ignored, as under nohup, stays ignored."""
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self.shut_down, signal.SIGINT: self.shut_down}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._on_hangup
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        # A multi-GPU parent starts its workers with SIGHUP blocked: one that came before now is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)
                if self.stop.is_set():
                    # It is leaving; by default, one signal more would change its exit code.
                    signal.signal(number, lambda _number, _frame: None)

    def shut_down(self) -> None:
        """Act as on SIGTERM."""
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return what ``work`` returns, or None if a signal to stop comes first. Raises what ``work`` raises."""
        working = asyncio.create_task(work, name="start")
        stopping = asyncio.create_task(self.stop.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            return working.result()
        log.info("stopped while starting")
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):  # its result is not needed any more
            await working
        return None

    def _on_hangup(self) -> None:
        """Reload the settings; or, when the SIGHUP means that our terminal is gone, stop."""
        if self._terminal.gone():
            mute()  # a line of log would be an error in the middle of a job
            self.shut_down()
        else:
            self._on_reload()
