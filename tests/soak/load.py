# SPDX-License-Identifier: Apache-2.0
"""The producer: a steady mixed load, every publish confirmed, refused, or of unknown fate and then sent again."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

import aio_pika
from aio_pika.exceptions import AMQPError, DeliveryError, PublishError

from acestep_consumer.broker.topology import CONTROL, REQUESTS

if TYPE_CHECKING:
    from types import TracebackType

    from aio_pika.abc import AbstractChannel, AbstractConnection

_CONFIRM_S = 15.0
_AGAIN_S = 0.3
_TASKS_AT_MOST = 200


class Sort(StrEnum):
    """What a request is like."""

    SONG = "song"
    TWO_SONGS = "two songs"
    LARGE = "song of several parts"
    TWICE = "sent twice"
    INVALID = "invalid"
    DEADLY = "kills its engine"
    EXPIRING = "with an expiration"
    CANCELLED = "cancelled"


_SHARES = {
    Sort.SONG: 50,
    Sort.TWO_SONGS: 10,
    Sort.LARGE: 3,
    Sort.TWICE: 9,
    Sort.INVALID: 10,
    Sort.DEADLY: 1,
    Sort.EXPIRING: 9,
    Sort.CANCELLED: 8,
}
_LARGE_BYTES = 9_000_000  # more than one part of an upload


@dataclass
class Submission:
    """One task id and what became of its messages on their way in."""

    task_id: str
    sort: Sort
    sent_at: float
    confirmed: int = 0
    refused: int = 0
    unknown: int = 0
    cancel_sent: bool = False

    @property
    def copies(self) -> int:
        """Messages that the broker has, or may have."""
        return self.confirmed + self.unknown


class Producer:
    """Publishes on a connection of its own, straight to the broker; connects again whenever that is gone."""

    def __init__(self, url: str, seed: int, rate: float) -> None:
        self._url = url
        self._chance = random.Random(seed + 1)  # noqa: S311 - a load that can be repeated, no secret
        self._rate = rate
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._connecting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.submissions: dict[str, Submission] = {}
        self.skipped = 0
        """Requests that were not sent because too many were waiting for the broker already."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close()

    async def run(self, length_s: float) -> None:
        """Send requests for so long, then see every one of them confirmed or refused."""
        began = time.monotonic()
        number = 0
        while (now := time.monotonic()) < began + length_s:
            sort = self._chance.choices(list(_SHARES), list(_SHARES.values()))[0]
            story = self._story(f"soak-{number:05d}", sort, self._chance.random())
            number += 1
            if len(self._tasks) < _TASKS_AT_MOST:
                self._spawn(story)
            else:
                story.close()
                self.skipped += 1
            await asyncio.sleep(began + number / self._rate - now)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, story: Any) -> None:
        task = asyncio.create_task(story)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _story(self, task_id: str, sort: Sort, dose: float) -> None:
        """Send one request, and what belongs to it."""
        submission = self.submissions[task_id] = Submission(task_id, sort, time.monotonic())
        body = _body(task_id, sort, dose)
        expiration = 0.2 + 2 * dose if sort is Sort.EXPIRING else None
        await self._send(submission, body, expiration)
        if sort is Sort.TWICE:
            await asyncio.sleep(3 * dose)
            await self._send(submission, body, expiration)
        if sort is Sort.CANCELLED:
            await asyncio.sleep(2 * dose)
            await self._cancel(submission)

    async def _send(self, submission: Submission, body: bytes, expiration: float | None) -> None:
        """Publish until the broker has said yes or no."""
        while True:
            try:
                channel = await self._open()
                exchange = await channel.get_exchange(REQUESTS, ensure=False)
                message = aio_pika.Message(
                    body,
                    message_id=submission.task_id,
                    delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                    expiration=expiration,
                    timestamp=datetime.now(UTC),
                )
            except (AMQPError, OSError, RuntimeError):
                await self._drop()
                continue
            try:
                await exchange.publish(message, "generate", timeout=_CONFIRM_S)
            except PublishError:  # the queue is not there yet: the broker has just come up
                await asyncio.sleep(_AGAIN_S)
            except DeliveryError:
                submission.refused += 1
                return
            except (AMQPError, OSError, RuntimeError):
                submission.unknown += 1
                await self._drop()
            else:
                submission.confirmed += 1
                return

    async def _cancel(self, submission: Submission) -> None:
        while not submission.cancel_sent:
            try:
                channel = await self._open()
                control = await channel.get_exchange(CONTROL, ensure=False)
                message = aio_pika.Message(
                    b"", delivery_mode=aio_pika.DeliveryMode.PERSISTENT, timestamp=datetime.now(UTC)
                )
                await control.publish(message, f"cancel.{submission.task_id}", mandatory=False, timeout=_CONFIRM_S)
            except (AMQPError, OSError, RuntimeError):
                await self._drop()
            else:
                submission.cancel_sent = True

    async def _open(self) -> AbstractChannel:
        async with self._connecting:
            if self._channel is None or self._channel.is_closed:
                await self._close()
                self._connection = await aio_pika.connect(
                    self._url, timeout=10, client_properties={"connection_name": "producer"}
                )
                self._channel = await self._connection.channel(on_return_raises=True)
            return self._channel

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(AMQPError, OSError, RuntimeError):
                await connection.close()

    async def _drop(self) -> None:
        """After a loss, wait a moment; the next call connects again if need be."""
        await asyncio.sleep(_AGAIN_S)


def _body(task_id: str, sort: Sort, dose: float) -> bytes:
    if sort is Sort.INVALID and dose < 1 / 3:
        return b'{"prompt": "never closed'
    # What takes longer asks for more music, as it would be with a model: workers estimate the one from the other.
    songs = 2 if sort is Sort.TWO_SONGS else 1
    takes = 3 * dose if sort is Sort.CANCELLED else songs * (0.1 + dose)
    words = [f"takes={takes:.2f}"]
    if sort is Sort.LARGE:
        words.append(f"bytes={_LARGE_BYTES}")
    if sort is Sort.DEADLY:
        words.append("crash")
    fields: dict[str, Any] = {
        "task_id": task_id,
        "prompt": " ".join(words),
        "audio_format": "wav",
        "audio_duration": round(10 + 100 * takes / songs),
    }
    if songs > 1:
        fields["batch_size"] = songs
    if sort is Sort.INVALID:
        fields["batch_size"] = "many"
    return json.dumps(fields).encode()
