# SPDX-License-Identifier: Apache-2.0
"""What a worker is told by signals: SIGTERM and SIGINT to leave, again: at once; SIGHUP to read the settings again."""

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
    """Listens to signals, and remembers whether to leave.

    Args:
        on_reload: called on a SIGHUP that an operator sent.

    Attributes:
        stop: set by the first signal to leave.
        hurry: set by the second.
    """

    def __init__(self, on_reload: Callable[[], None]) -> None:
        self._on_reload = on_reload
        self._terminal = Terminal()
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen. A SIGHUP that is ignored, as under nohup, stays so."""
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self.leave, signal.SIGINT: self.leave}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._on_hangup
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        # A fleet starts its workers with SIGHUP held back: one that came before now is delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def leave(self) -> None:
        """Act as on a signal to leave."""
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do this, but not longer than until the signal to leave: None then. Raises what ``work`` raises."""
        working = asyncio.create_task(work, name="start")
        stopping = asyncio.create_task(self.stop.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            return working.result()
        log.info("told to stop while starting")
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):  # whatever it was, it is not needed any more
            await working
        return None

    def _on_hangup(self) -> None:
        """Have the settings read again; but when it is our terminal that went, leave."""
        if self._terminal.gone():
            mute()  # a line of log would be an error in the middle of a job
            self.leave()
        else:
            self._on_reload()
