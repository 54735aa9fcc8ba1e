# SPDX-License-Identifier: Apache-2.0
"""The worker itself, with metrics, logs and tracing on and off by turns: one process, so that all else is equal.

On: jobs are counted, the log is at `info` and JSON, spans are recorded and exported in batches. Off: nothing is
counted, the log is at `error`, and tracing is as if OpenTelemetry were not installed.

It works in stretches. Before each it prints `on` or `off`, after the last one `done`, and waits for a line on standard
input each time. No message begins before the last one of the stretch before is acked, and no clock runs in between.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from acestep_consumer.app import run_worker
from acestep_consumer.config.logs import set_log_level
from acestep_consumer.config.settings import Settings
from acestep_consumer.observability import tracing
from acestep_consumer.observability.job_stats import JobStats
from tests.bench.arena import settings_for
from tests.bench.contenders.worker import InstantRenderer
from tests.bench.throughput import Moment, observe_requests
from tests.support.fake_engine import FakeEngines

STRETCH = int(os.environ["BENCH_STRETCH"])
"""Messages of a stretch."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """What one stretch took: seconds to the last ack, and CPU seconds until its last span was sent, too."""

    on: bool
    messages: int
    seconds: float
    cpu_seconds: float


class Switch:
    """Turns metrics, logs and tracing on and off, all at once."""

    def __init__(self) -> None:
        self._count = (JobStats.job_ended, JobStats.event_repeated)

    def turn(self, *, on: bool) -> None:
        """Do it."""
        tracing.INSTALLED = on
        set_log_level("info" if on else "error")
        ended, repeated = self._count if on else (_nothing, _nothing)
        JobStats.job_ended, JobStats.event_repeated = ended, repeated  # type: ignore[method-assign] # the switch itself


def _nothing(*_: Any, **__: Any) -> None:
    """Count nothing."""


class Stretches:
    """Cuts the messages into stretches: the first to get warm, then pairs, on and off in both orders by turns."""

    def __init__(self, messages: int) -> None:
        self._plan = list(_turns(messages // STRETCH))
        self._switch = Switch()
        self._delivered = self._acked = 0
        self._arrived = asyncio.Event()
        self._gates = [asyncio.Event() for _ in self._plan]
        self._closed = [asyncio.Event() for _ in self._plan]
        observe_requests(self._on_delivery, self._on_ack)

    async def run(self) -> list[Stretch]:
        """Let all messages through; return the stretches but for the first."""
        await self._arrived.wait()
        found = [await self._one(number, on=on) for number, on in enumerate(self._plan)]
        await _permission("done")
        return found[1:]

    async def _one(self, number: int, *, on: bool) -> Stretch:
        await _permission("on" if on else "off")
        self._switch.turn(on=on)
        began = Moment.now()
        self._gates[number].set()
        await self._closed[number].wait()
        seconds, _ = began.until(Moment.now())
        provider = trace.get_tracer_provider()
        if on and isinstance(provider, TracerProvider):
            await asyncio.to_thread(provider.force_flush)
        _, cpu_seconds = began.until(Moment.now())
        return Stretch(on, STRETCH, seconds, cpu_seconds)

    async def _on_delivery(self) -> None:
        number = self._delivered // STRETCH
        self._delivered += 1
        self._arrived.set()
        await self._gates[number].wait()

    def _on_ack(self) -> None:
        self._acked += 1
        if self._acked % STRETCH == 0:
            self._closed[self._acked // STRETCH - 1].set()


def _turns(count: int) -> Iterator[bool]:
    """Warm-up, then on-off, off-on, on-off, … : what drifts falls on both alike."""
    yield True
    for place in range(count - 1):
        yield (place % 2 == 0) is (place // 2 % 2 == 0)


async def _permission(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)


async def main(settings: Settings, messages: int) -> int:
    """Run until ``messages`` are acked, then print the stretches as a line of JSON."""
    stretches = Stretches(messages)
    worker = asyncio.create_task(run_worker(settings, grace_s=10, engines=FakeEngines(InstantRenderer())))
    running = asyncio.create_task(stretches.run())
    await asyncio.wait((worker, running), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        sys.stdout.write(json.dumps([asdict(stretch) for stretch in running.result()]) + "\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGTERM)
    return await worker


if __name__ == "__main__":
    SETTINGS = settings_for(
        int(sys.argv[1]),
        ACESTEP_LOG_LEVEL="info",
        ACESTEP_LOG_FORMAT="json",
        ACESTEP_HTTP_PORT=os.environ["BENCH_HTTP_PORT"],
    )
    sys.exit(asyncio.run(main(SETTINGS, int(sys.argv[2]))))
