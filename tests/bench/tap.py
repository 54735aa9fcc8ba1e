# SPDX-License-Identifier: Apache-2.0
"""The clock inside a contender, at the one place that all of them pass: aiormq's channel.

It runs from the first delivery to the last ack, and counts CPU seconds of the process over the same time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aiormq.channel import Channel

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage


@dataclass(frozen=True, slots=True)
class Lap:
    """What a contender measured about itself."""

    messages: int
    seconds: float
    cpu_seconds: float

    def tell(self) -> None:
        """Print it as a line of JSON, for whoever started this process."""
        sys.stdout.write(json.dumps(asdict(self)) + "\n")
        sys.stdout.flush()


class Tap:
    """Listens in on every channel of this process until ``expected`` messages are acked."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._acked = 0
        self._began = 0.0
        self._began_cpu = 0.0
        self._lap: asyncio.Future[Lap] = asyncio.get_running_loop().create_future()
        self._wrap_consume()
        self._wrap_ack()

    async def lap(self) -> Lap:
        """Wait for the last ack."""
        return await self._lap

    def _wrap_consume(self) -> None:
        consume = Channel.basic_consume

        async def basic_consume(channel: Channel, queue: str, consumer_callback: Any, **rest: Any) -> Any:
            async def on_delivery(message: DeliveredMessage) -> Any:
                if not self._began:
                    self._began, self._began_cpu = time.perf_counter(), time.process_time()
                return await consumer_callback(message)

            return await consume(channel, queue, on_delivery, **rest)

        Channel.basic_consume = basic_consume  # type: ignore[method-assign, assignment] # the tap itself

    def _wrap_ack(self) -> None:
        ack = Channel.basic_ack

        async def basic_ack(channel: Channel, *arguments: Any, **rest: Any) -> None:
            await ack(channel, *arguments, **rest)
            self._acked += 1
            if self._acked == self._expected:
                seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._began_cpu
                self._lap.set_result(Lap(self._acked, seconds, cpu))

        Channel.basic_ack = basic_ack  # type: ignore[method-assign, assignment] # the tap itself
