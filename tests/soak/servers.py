# SPDX-License-Identifier: Apache-2.0
"""What a soak runs on: a broker and an S3 server of its own, the workers' slots, and a look at what is left."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import aio_pika

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.dead_letter_notices import OVERFULL
from acestep_consumer.broker.errors import BrokerError
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, IDENTIFIED, NOTICES
from acestep_consumer.config.settings import load
from infra.local.packages import ensure_rabbitmq
from infra.local.rabbitmq import RabbitMQ
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.soak.plan import WORKER_SLOTS
from tests.soak.worker_slot import WorkerSlot
from tests.support.servers import ManagementApi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PREFETCH = 4
LIMIT = 60
MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Depth:
    """How many messages wait for workers: requests, and notices of requests that the broker gave up."""

    ready: int
    unacked: int


class SoakServers:
    """The servers and the workers of one soak. An async context manager: entering declares everything."""

    def __init__(self, folder: Path, *, quorum: bool, engine: str, code: Sequence[Path]) -> None:
        """Reserve ports.

        Args:
            folder: for all files.
            quorum: quorum queues in place of classic ones.
            engine: ``light``, or ``tiny`` for the real processes with a model of random weights.
            code: the source tree that each worker runs.
        """
        self._stack = AsyncExitStack()
        self.folder = folder
        self.broker = RabbitMQ(folder / "rabbitmq", management=True)
        self.s3 = SeaweedFS(folder / "s3")
        servers = Environment.of(self.broker.amqp_url, self.s3)
        self.environment = servers.variables() | {
            "ACESTEP_S3_PREFIX": "soak",
            "ACESTEP_QUEUE_TYPE": "quorum" if quorum else "classic",
            "ACESTEP_QUEUE_WORKERS": str(PREFETCH),
            "ACESTEP_QUEUE_MAXSIZE": str(LIMIT),
            "ACESTEP_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
        }
        if engine == "tiny":
            self.environment |= {"ACESTEP_CHECKPOINT_DIR": str(_checkpoints(folder)), "ACESTEP_DEVICE": "cpu"}
        self.slots = [
            WorkerSlot(number, folder, self.environment, code=code[number], light=engine == "light")
            for number in range(WORKER_SLOTS)
        ]

    async def __aenter__(self) -> Self:
        ensure_rabbitmq()
        await self._stack.__aenter__()
        self._stack.callback(self.broker.close)
        self._stack.callback(self.s3.close)
        await asyncio.gather(asyncio.to_thread(self.broker.start), asyncio.to_thread(self.s3.start))
        settings = load(environ=self.environment, env_file=None).broker
        async with BrokerConnection(settings, "soak"):
            pass  # it declares the topology
        for slot in self.slots:
            await self._stack.enter_async_context(slot)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def close_connections(self) -> None:
        """Have the broker close everybody's connection, as an operator would."""
        with suppress(BrokerError):  # it is away
            ManagementApi(self.broker).close_connections("/")

    async def depth(self) -> Depth:
        """Ask the broker, which counts exactly; rabbitmqctl takes a second."""
        listed = await asyncio.to_thread(
            self.broker.ctl, "list_queues", "name", "messages_ready", "messages_unacknowledged", "--silent"
        )
        rows = (line.split("\t") for line in listed.splitlines())
        counts = {row[0]: row[1:] for row in rows if len(row) == 3}
        waiting = [counts[queue] for queue in (GENERATE, IDENTIFIED, NOTICES)]
        return Depth(sum(int(ready) for ready, _ in waiting), sum(int(unacked) for _, unacked in waiting))

    async def dead_letters(self) -> list[tuple[str, bytes]]:
        """Take all dead letters and return message id and body; not of those that went back to their queue at once.

        A classic queue that restarts over its limit gives up the oldest; workers put them back.
        """
        found: list[tuple[str, bytes]] = []
        async with await aio_pika.connect(self.broker.amqp_url) as connection:
            channel = await connection.channel()
            queue = await channel.get_queue(DEAD_LETTER, ensure=False)
            while (message := await queue.get(no_ack=True, fail=False)) is not None:
                deaths: Any = message.headers.get("x-death") or [{}]
                if deaths[0].get("reason") != OVERFULL:
                    found.append((message.message_id or "", message.body))
        return found

    def leftovers(self) -> list[str]:
        """Return what lies in the workers' scratch folders."""
        return [str(path.relative_to(self.folder)) for slot in self.slots for path in sorted(slot.scratch.iterdir())]


def _checkpoints(folder: Path) -> Path:
    from acestep_consumer.engine.testing import tiny_checkpoint  # noqa: PLC0415 - needs torch

    checkpoints = folder / "checkpoints"
    tiny_checkpoint.write(checkpoints)
    return checkpoints
