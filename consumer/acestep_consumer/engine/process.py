# SPDX-License-Identifier: Apache-2.0
"""An engine process as a child of the consumer process: start, messages, end. It knows nothing of jobs.

The pipe is a socket pair that the child inherits. The child exits when it closes, so that no engine outlives its
consumer, however that ended.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Self

import structlog
from pydantic import ValidationError

from acestep_consumer.engine import framing
from acestep_consumer.engine.messages import FROM_ENGINE, TO_ENGINE, FromEngine, ToEngine

GRACE_S = 5.0
SECRETS = ("ACESTEP_AMQP_URL", "ACESTEP_MANAGEMENT_URL", "AWS_")
"""Prefixes of environment variables that contain credentials."""

READ_AFTER_EXIT_S = 1.0
"""Time to read the last messages of a child that has exited."""

log = structlog.get_logger()


class EngineProcess:
    """A running child: ``start`` it, iterate ``messages()`` until they end, then ``end`` it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        # A grandchild may hold the child's end of the pipe open after the child has exited.
        self._ending = asyncio.create_task(self._close_after_end(), name="engine process's end")

    @classmethod
    async def start(cls, module: str, environment: Mapping[str, str] | None = None) -> Self:
        """Run ``python -m module FD``, where FD is the child's end of a socket pair. It logs to the inherited stderr.

        It inherits the environment, except credentials for the broker and for storage: it needs neither.
        ``environment`` is added. Ctrl-C in a terminal reaches every process; this one ends with its consumer.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
        ours, theirs = socket.socketpair()
        with theirs, _interrupt_blocked():
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env={**inherited, **(environment or {})},
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue one message; for a child that has exited it is dropped, and ``messages`` ends."""
        if not self._writer.is_closing():
            self._writer.write(framing.pack(TO_ENGINE.dump_json(message)))

    async def messages(self) -> AsyncIterator[FromEngine]:
        """Yield the child's messages until the pipe closes. A child that sends an invalid message is killed."""
        try:
            while True:
                yield FROM_ENGINE.validate_json(await framing.read(self._reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except ValidationError:
            log.exception("invalid message from the engine process", pid=self.pid)
            await self.kill()

    def close(self) -> None:
        """Close the pipe; the child exits then."""
        self._writer.close()

    async def end(self) -> int:
        """Close the pipe, wait a moment for the child to exit, then kill it. Returns its exit code."""
        self.close()
        try:
            async with asyncio.timeout(GRACE_S):
                return await self._process.wait()
        except TimeoutError:
            return await self.kill()
        finally:
            self._ending.cancel()

    async def kill(self) -> int:
        """Kill the child; ``messages`` ends with it. Returns its exit code, negative for a signal."""
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()

    async def _close_after_end(self) -> None:
        await self._process.wait()
        await asyncio.sleep(READ_AFTER_EXIT_S)
        self.close()


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Block SIGINT for this thread and the processes that it starts, before they can ignore it themselves.

    Two engines start at the same time, and each is forked at once: the first one here unblocks it, whoever ends first.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if signal.SIGINT not in before:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
