# SPDX-License-Identifier: Apache-2.0
"""Measures a contender's throughput at the one place that all of them pass: aiormq's channel.

It runs from the first delivery to the last ack, and counts CPU seconds of the process over the same time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from aiormq.channel import Channel

from acestep_consumer.broker.topology import GENERATE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiormq.abc import DeliveredMessage


@dataclass(frozen=True, slots=True)
class Throughput:
    """Messages of one run, with its seconds and CPU seconds."""

    messages: int
    seconds: float
    cpu_seconds: float

    def print_json(self) -> None:
        """Print it as a line of JSON, for the process that started this one."""
        sys.stdout.write(json.dumps(asdict(self)) + "\n")
        sys.stdout.flush()


class ThroughputMeter:
    """Observes every channel of this process until ``expected`` messages are acked."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._acked = 0
        self._began: Moment | None = None
        self._result: asyncio.Future[Throughput] = asyncio.get_running_loop().create_future()
        observe_requests(self._on_delivery, self._on_ack)

    async def result(self) -> Throughput:
        """Wait for the last ack."""
        return await self._result

    async def _on_delivery(self) -> None:
        if self._began is None:
            self._began = Moment.now()

    def _on_ack(self) -> None:
        self._acked += 1
        if self._acked == self._expected and self._began is not None:
            seconds, cpu_seconds = self._began.until(Moment.now())
            self._result.set_result(Throughput(self._acked, seconds, cpu_seconds))


@dataclass(frozen=True, slots=True)
class Moment:
    """Wall-clock time and the process's CPU time of all threads, in seconds."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Self:
        """Read them."""
        return cls(time.perf_counter(), time.process_time())

    def until(self, end: Moment) -> tuple[float, float]:
        """Return the seconds on both."""
        return end.wall - self.wall, end.cpu - self.cpu


def observe_requests(on_delivery: Callable[[], Awaitable[None]], on_ack: Callable[[], None]) -> None:
    """Call these for every request of this process: before its handler begins, and once its ack has left."""
    consume, ack = Channel.basic_consume, Channel.basic_ack
    of_requests: set[Channel] = set()

    async def basic_consume(channel: Channel, queue: str, consumer_callback: Any, **rest: Any) -> Any:
        async def delivered(message: DeliveredMessage) -> Any:
            await on_delivery()
            return await consumer_callback(message)

        if queue != GENERATE:  # the worker consumes other queues, too
            return await consume(channel, queue, consumer_callback, **rest)
        of_requests.add(channel)
        return await consume(channel, queue, delivered, **rest)

    async def basic_ack(channel: Channel, *arguments: Any, **rest: Any) -> None:
        await ack(channel, *arguments, **rest)
        if channel in of_requests:
            on_ack()

    Channel.basic_consume = basic_consume  # type: ignore[method-assign, assignment] # the meter itself
    Channel.basic_ack = basic_ack  # type: ignore[method-assign, assignment] # as above
