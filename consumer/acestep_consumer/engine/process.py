# SPDX-License-Identifier: Apache-2.0
"""One engine process as the consumer sees it: started, spoken to, ended. Knows nothing of jobs.

The pipe is a socket pair that the child inherits. Its end is the child's signal to leave, so that no engine outlives
its consumer, however that died.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Self

import structlog
from pydantic import ValidationError

from acestep_consumer.engine import framing
from acestep_consumer.engine.messages import FROM_ENGINE, TO_ENGINE, FromEngine, ToEngine

GRACE_S = 5.0
SECRETS = ("ACESTEP_AMQP_URL", "ACESTEP_MANAGEMENT_URL", "AWS_")
"""What variables with keys in them begin with."""

LAST_WORDS_S = 1.0
"""What a child said before its end is read within this time."""

log = structlog.get_logger()


class EngineProcess:
    """A running child. ``start`` it, iterate ``messages()`` until they end, then ``end`` it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        # A child of the child may hold its end of the pipe open beyond its death.
        self._ending = asyncio.create_task(self._close_after_end(), name="engine process's end")

    @classmethod
    async def start(cls, module: str) -> Self:
        """Run ``python -m module FD`` with our end of a socket pair open here. It inherits stderr for its log.

        It inherits the environment too, but for the keys to the broker and to storage: it needs neither.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.startswith(SECRETS)},
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue one message; a child that is gone takes nothing, and ``messages`` tells so."""
        if not self._writer.is_closing():
            self._writer.write(framing.pack(TO_ENGINE.dump_json(message)))

    async def messages(self) -> AsyncIterator[FromEngine]:
        """Yield what the child says, until it is gone. One that says what cannot be understood is ended."""
        try:
            while True:
                yield FROM_ENGINE.validate_json(await framing.read(self._reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except ValidationError:
            log.exception("engine not understood", pid=self.pid)
            await self.kill()

    def close(self) -> None:
        """Close the pipe, which tells the child to leave."""
        self._writer.close()

    async def end(self) -> int:
        """Close the pipe, give the child a moment to leave, kill it if it stays. Returns its exit code."""
        self.close()
        try:
            return await asyncio.wait_for(self._process.wait(), GRACE_S)
        except TimeoutError:
            return await self.kill()
        finally:
            self._ending.cancel()

    async def kill(self) -> int:
        """End the child now; ``messages`` ends with it. Returns its exit code, negative for a signal."""
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()

    async def _close_after_end(self) -> None:
        await self._process.wait()
        await asyncio.sleep(LAST_WORDS_S)
        self.close()
