# SPDX-License-Identifier: Apache-2.0
"""Load for whole workers: keeps the queue filled with one workload after the other, and counts what comes back."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import aio_pika

from acestep_consumer.broker.topology import GENERATE
from acestep_consumer.client import Client, ClientError
from acestep_schemas.events import Completed, JobCompleted, JobProgress, JobStarted, Unfinished, WorkerEvent

POLL_S: Final = 0.1
SHORTEST_MIXED_S: Final = 30
_TERMINAL: Final = tuple(f"job.{state}.*" for state in ("completed", "failed", "rejected", "cancelled", "expired"))
_MIX_SEED: Final = 16


class LoadError(Exception):
    """The load cannot be made, or be counted any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked for, and how much of it at once.

    Attributes:
        name: as it stands in the results.
        fields: of every request, over the usual ones.
        mixed: lengths between 30 seconds and the usual one, in place of that alone.
        in_flight: jobs that the workers run at once.
        seconds: the window in which songs are counted.
    """

    name: str
    fields: Mapping[str, object] = field(default_factory=dict)
    mixed: bool = False
    in_flight: int
    seconds: float

    @classmethod
    def of(cls, text: str, in_flight: int, seconds: float) -> Self:
        """Read ``NAME[@IN_FLIGHT][:SECONDS]``. Raises ``LoadError`` for a name that is none of ``WORKLOADS``."""
        words, _, window = text.strip().partition(":")
        name, _, given = words.partition("@")
        if name not in WORKLOADS:
            raise LoadError(f"no workload {name!r}: choose among {', '.join(WORKLOADS)}")
        fields, mixed, own = WORKLOADS[name]
        chosen = int(given) if given else own or in_flight
        return cls(name=name, fields=fields, mixed=mixed, in_flight=chosen, seconds=float(window or seconds))

    def requests(self, usual: Mapping[str, object]) -> Iterator[dict[str, object]]:
        """Yield the requests' fields for ever; the same ones in every run."""
        draw = random.Random(_MIX_SEED)  # noqa: S311 - no secret
        while True:
            found = {**usual, **self.fields}
            if self.mixed:
                longest = int(float(str(usual["audio_duration"])))
                found["audio_duration"] = draw.randint(min(SHORTEST_MIXED_S, longest), longest)
            yield found


_PLAIN: Final = {"thinking": False}
WORKLOADS: Final[Mapping[str, tuple[Mapping[str, object], bool, int]]] = {
    "mp3": ({"audio_format": "mp3"}, False, 0),
    "flac": ({"audio_format": "flac"}, False, 0),
    "opus": ({"audio_format": "opus"}, False, 0),
    "plain": ({"audio_format": "flac", **_PLAIN}, False, 0),
    "plain-30s": ({"audio_format": "flac", "audio_duration": 30, **_PLAIN}, False, 0),
    "mixed": ({"audio_format": "flac"}, True, 0),
    "alone": ({"audio_format": "flac"}, False, 1),
    "alone-30s": ({"audio_format": "flac", "audio_duration": 30, **_PLAIN}, False, 1),
    "timestamps": ({"audio_format": "flac", "timestamps": True}, False, 0),
    "plain-timestamps": ({"audio_format": "flac", "timestamps": True, **_PLAIN}, False, 0),
    "alone-timestamps": ({"audio_format": "flac", "timestamps": True}, False, 1),
    "candidates": ({"audio_format": "flac", "candidates": 4, **_PLAIN}, False, 0),
    "draft": ({"audio_format": "flac", "quality": "draft", "inference_steps": None, **_PLAIN}, False, 0),
    "loudness": ({"audio_format": "flac", "loudness_lufs": -14, **_PLAIN}, False, 0),
}
"""Name: fields over the usual ones, whether lengths are mixed, jobs in flight (0: as many as is said)."""


def usual_fields(arguments: argparse.Namespace, *, thinking: bool) -> dict[str, object]:
    """Return what every request says. The metadata is given: random weights would write odd ones.

    The tokenizers here know bytes alone: the words are short, and yet as many tokens as a usual song's.
    """
    return {
        "prompt": "upbeat electronic dance music with a bright lead",
        "lyrics": "[verse]\n" + "A message waits in line\nA melody comes out\n" * 6,
        "audio_duration": arguments.duration,
        "bpm": 120,
        "key_scale": "C major",
        "time_signature": "4",
        "vocal_language": "en",
        "thinking": thinking,
        "use_cot_caption": False,
        "batch_size": 1,
        "inference_steps": 8,
        "audio_format": arguments.audio_format,
    }


@dataclass(slots=True)
class Tally:
    """What came back, each with its moment (``time.monotonic``)."""

    completed: list[tuple[float, Completed]] = field(default_factory=list)
    unfinished: list[tuple[float, Unfinished]] = field(default_factory=list)

    def finished(self) -> int:
        """How many jobs have ended, whichever way."""
        return len(self.completed) + len(self.unfinished)

    def between(self, start: float, end: float) -> list[tuple[float, Completed]]:
        """The songs that were completed in this time."""
        return [(at, done) for at, done in self.completed if start < at <= end]


class Load:
    """Keeps the queue filled and hears what becomes of it.

    Args:
        client: publishes and subscribes.
        usual: fields of every request.
        workload: the first one.
        capacity: jobs that all workers take at once.
        backlog: jobs that wait in the queue, for each in flight.
        spread_s: seconds over which the first jobs are handed in: jobs that begin together would also end together.
    """

    def __init__(
        self,
        client: Client,
        usual: Mapping[str, object],
        workload: Workload,
        *,
        capacity: int,
        backlog: float,
        spread_s: float,
    ) -> None:
        self.tally = Tally()
        self._client = client
        self._usual = usual
        self._capacity = capacity
        self._backlog = backlog
        self._spread_s = spread_s
        self._sent = 0
        self._take(workload)

    def _take(self, workload: Workload) -> None:
        self._requests = workload.requests(self._usual)
        self._in_flight = workload.in_flight
        # Fewer jobs than the workers take have none waiting behind them: those would be taken, too.
        backlog = self._backlog if workload.in_flight >= self._capacity else 0
        self._most = round(workload.in_flight * (1 + backlog))
        self._began = time.monotonic()

    def under_way(self) -> int:
        """How many requests have been sent and not ended; those that wait in the queue included."""
        return self._sent - self.tally.finished()

    async def change(self, workload: Workload, amqp_url: str) -> None:
        """Take back what waits, and go on with another workload."""
        async with await aio_pika.connect(amqp_url) as connection:
            queue = await (await connection.channel()).declare_queue(GENERATE, passive=True)
            purged = await queue.purge()
        self._sent -= purged.message_count or 0
        self._take(workload)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Future[Any]]:
        """Feed and listen while the block runs. Gives what ends only when one of them breaks."""
        async with self._client.subscribe(*_TERMINAL) as events:
            both = asyncio.gather(self._hear(events), self._feed())
            try:
                yield both
            finally:
                both.cancel()
                with suppress(asyncio.CancelledError, ClientError):
                    await both

    async def _hear(self, events: AsyncIterator[Any]) -> None:
        async for event in events:
            if isinstance(event, JobCompleted):
                self.tally.completed.append((time.monotonic(), event.data))
            elif not isinstance(event, JobStarted | JobProgress | WorkerEvent):
                self.tally.unfinished.append((time.monotonic(), event.data))
        raise LoadError("the broker ended the subscription")

    async def _feed(self) -> None:
        while True:
            missing = self._allowed() - (self._sent - self.tally.finished())
            for _ in range(missing):
                self._sent += 1
                await self._client.submit(next(self._requests))
            await asyncio.sleep(POLL_S)

    def _allowed(self) -> int:
        """How many requests may be under way: at first a few more each moment, then as many as can be and a backlog."""
        elapsed = time.monotonic() - self._began
        return self._most if elapsed >= self._spread_s else 1 + int((self._in_flight - 1) * elapsed / self._spread_s)
