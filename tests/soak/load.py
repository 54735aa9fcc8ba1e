# SPDX-License-Identifier: Apache-2.0
"""The producer: a steady mixed load, every publish confirmed, refused, or of unknown fate and then sent again."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

import aio_pika
import pika
from aio_pika.exceptions import AMQPError, DeliveryError, PublishError
from pika.exceptions import AMQPError as PikaError
from pika.exceptions import NackError, UnroutableError

from acestep_consumer.broker.channel_numbers import connect
from acestep_consumer.broker.topology import CONTROL, MAX_PRIORITY, REQUESTS
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aio_pika.abc import AbstractChannel, AbstractConnection
    from aiohttp import web

    from tests.support.event_recorder import EventRecorder, RecordedEvent
    from tests.support.faulty_s3 import FaultyS3
    from tests.support.object_store import ObjectStore
    from tests.support.proxy import Proxy

# The word of a prompt that names the submission, for what has no id.
NAME = "name="
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
    WITHOUT_ID = "without an id"
    REUSED_ID = "cancelled when its song is stored, and its id used for another request"
    WORSE_DUPLICATE = "followed by garbage, or by a copy that expires, under its id"
    AUDIO_DELETED = "its audio is deleted, then it is sent again"
    CUT_OFF = "expires while it is made, and its worker is cut off"


# What workers of 0.1.0 promised, too.
FIRST_RELEASE = {
    Sort.SONG: 50,
    Sort.TWO_SONGS: 10,
    Sort.LARGE: 3,
    Sort.TWICE: 9,
    Sort.INVALID: 10,
    Sort.DEADLY: 1,
    Sort.EXPIRING: 9,
    Sort.CANCELLED: 8,
}
SHARES = {
    **FIRST_RELEASE,
    Sort.WITHOUT_ID: 8,
    Sort.REUSED_ID: 6,
    Sort.WORSE_DUPLICATE: 6,
    Sort.AUDIO_DELETED: 4,
    Sort.CUT_OFF: 3,
}
# They need the renderer process that has no model.
_LIGHT_ONLY = {Sort.LARGE, Sort.DEADLY}
_SMALL_BYTES, _LARGE_BYTES = 20_000, 9_000_000  # the latter is more than one part of an upload
# A cancellation concerns what was sent in its second or before.
_AFTER_A_CANCELLATION_S = 2.1
_WORSE_EXPIRES_S = 0.2
_CUT_OFF_EXPIRES_S = 3.0
_ANOTHER_SECOND_S = 1.1
_COMPLETED_WITHIN_S = 60.0
_STORED_WITHIN_S = 120.0
_CANCELLED_WITHIN_S = 15.0


@dataclass
class Submission:
    """One task and what became of its messages on their way in. Without an id, the worker names it otherwise."""

    task_id: str
    sort: Sort
    sent_at: float
    confirmed: int = 0
    refused: int = 0
    unknown: int = 0
    cancel_sent: bool = False
    song_left: bool = False
    """It was cancelled after its song was stored and before its manifest was; then its id was used again."""
    songs_owed: bool = False
    """A good request was accepted that no cancellation concerns: songs must come, whatever else has its id."""

    @property
    def copies(self) -> int:
        """Messages that the broker has, or may have."""
        return self.confirmed + self.unknown


class Producer:
    """Publishes on a connection of its own, straight to the broker; connects again whenever that is gone."""

    def __init__(
        self,
        url: str,
        chance: random.Random,
        rate: float,
        shares: Mapping[Sort, int],
        *,
        recorder: EventRecorder,
        object_store: ObjectStore,
        fronts: Sequence[FaultyS3],
        wires: Mapping[str, Proxy],
    ) -> None:
        """``fronts`` are the S3 of each worker, which can answer late; ``wires`` lead to the broker, by worker id."""
        self._url = url
        self._shares = shares
        self._recorder = recorder
        self._object_store = object_store
        self._fronts = fronts
        self._wires = wires
        self._chance = chance
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

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close()

    async def run(self, length_s: float) -> None:
        """Send requests for so long, then see every one of them confirmed or refused."""
        began = time.monotonic()
        number = 0
        while (now := time.monotonic()) < began + length_s:
            sort = self._chance.choices(list(self._shares), list(self._shares.values()))[0]
            story = self._story(number, sort, self._chance.random())
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

    async def _story(self, number: int, sort: Sort, dose: float) -> None:
        """Send one request, and what belongs to it."""
        task_id = f"soak-{number:05d}"
        submission = self.submissions[task_id] = Submission(task_id, sort, time.monotonic())
        body = _body(number, sort, dose)
        expiration = {Sort.EXPIRING: 0.2 + 2 * dose, Sort.CUT_OFF: _CUT_OFF_EXPIRES_S}.get(sort)
        with ExitStack() as held:
            if sort is Sort.REUSED_ID:
                held.enter_context(self._answered_late(task_id))
            if sort is Sort.WITHOUT_ID:
                await self._send_without_id(submission, body)
            else:
                await self._send(submission, body, expiration)
            if sort is Sort.REUSED_ID and submission.confirmed:
                await self._cancel_when_stored(submission)
        await self._afterwards(submission, number, body, dose)

    async def _afterwards(self, submission: Submission, number: int, body: bytes, dose: float) -> None:
        """What follows a request by its sort."""
        sort, task_id = submission.sort, submission.task_id
        match sort:
            case Sort.TWICE:
                await asyncio.sleep(3 * dose)
                await self._send(submission, body)
            case Sort.CANCELLED:
                await asyncio.sleep(2 * dose)
                await self._cancel(submission)
            case Sort.CUT_OFF:
                await self._cut_off(submission)
            case Sort.REUSED_ID:
                await asyncio.sleep(_AFTER_A_CANCELLATION_S)
                before = submission.confirmed
                await self._send(submission, _body(number, sort, dose, other=1))
                submission.songs_owed = submission.confirmed > before
            case Sort.WORSE_DUPLICATE:
                submission.songs_owed = submission.confirmed > 0
                # Within one second it would be the same message to a worker: AMQP's timestamp counts seconds.
                await asyncio.sleep(_ANOTHER_SECOND_S + 2 * dose)
                worse, expires = (b"garbage", None) if number % 2 else (body, _WORSE_EXPIRES_S)
                await self._send(submission, worse, expires)
            case Sort.AUDIO_DELETED:
                before = submission.confirmed
                again = await self._audio_deleted(task_id)
                # Until it is accepted the bucket lacks the audio, which is no fault of a worker.
                while again and submission.confirmed == before:
                    await self._send(submission, body)
                    await asyncio.sleep(_AGAIN_S)

    async def _cut_off(self, submission: Submission) -> None:
        """Cut the broker's connections to the worker that has begun, once the expiration has passed."""

        def begun_or_ended() -> list[RecordedEvent]:
            return self._recorder.of(submission.task_id)

        with suppress(AssertionError):
            await eventually(begun_or_ended, _COMPLETED_WITHIN_S)
        await asyncio.sleep(max(0.0, submission.sent_at + _CUT_OFF_EXPIRES_S + _AGAIN_S - time.monotonic()))
        begun = [event for event in begun_or_ended() if event.state == "started"]
        if begun and not self._recorder.terminal(submission.task_id):
            self._wires[begun[-1].data["worker_id"]].cut()

    @contextmanager
    def _answered_late(self, task_id: str) -> Iterator[None]:
        """Let no worker hear, within the block, that this job's first song is stored."""

        def stores(request: web.Request) -> bool:
            return request.method == "PUT" and f"/{task_id}/0." in request.path

        with ExitStack() as held:
            for front in self._fronts:
                held.enter_context(front.hold(stores, answered=True))
            yield

    async def _cancel_when_stored(self, submission: Submission) -> None:
        """Cancel a job once its song is in the bucket, and wait for its end."""
        task_id, stored, deadline = submission.task_id, False, time.monotonic() + _STORED_WITHIN_S
        while not stored and time.monotonic() < deadline:
            await asyncio.sleep(_AGAIN_S)
            stored = bool(await self._object_store.names(task_id))
        await self._cancel(submission)
        with suppress(AssertionError):
            await eventually(lambda: self._recorder.terminal(task_id), _CANCELLED_WITHIN_S)
        submission.song_left = stored and [end.state for end in self._recorder.terminal(task_id)] == ["cancelled"]

    async def _audio_deleted(self, task_id: str) -> bool:
        """Delete one song of the task once it is completed. False when it never is."""
        deadline = time.monotonic() + _COMPLETED_WITHIN_S
        while time.monotonic() < deadline:
            for end in self._recorder.terminal(task_id):
                if end.state == "completed":
                    await self._object_store.delete(end.data["audios"][0]["uri"])
                    return True
            await asyncio.sleep(_AGAIN_S)
        return False

    async def _send_without_id(self, submission: Submission, body: bytes) -> None:
        """Publish with pika: aio-pika gives an id to every message."""
        while True:
            try:
                await asyncio.to_thread(_publish_without_id, self._url, body)
            except UnroutableError:
                await asyncio.sleep(_AGAIN_S)
            except NackError:
                submission.refused += 1
                return
            except (NotSentError, OSError):
                await asyncio.sleep(_AGAIN_S)
            except PikaError:
                submission.unknown += 1
                await asyncio.sleep(_AGAIN_S)
            else:
                submission.confirmed += 1
                return

    async def _send(self, submission: Submission, body: bytes, expiration: float | None = None) -> None:
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
                    # It has to begin in time.
                    priority=MAX_PRIORITY if submission.sort is Sort.CUT_OFF else None,
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
                self._connection = await connect(self._url, "producer", 10)
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


class NotSentError(Exception):
    """There was no connection, so nothing was sent."""


def _publish_without_id(url: str, body: bytes) -> None:
    """Publish on a connection of its own, which blocks."""
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = parameters.blocked_connection_timeout = _CONFIRM_S
    try:
        connection = pika.BlockingConnection(parameters)
        channel = connection.channel()
        channel.confirm_delivery()
    except PikaError as error:
        raise NotSentError from error
    properties = pika.BasicProperties(delivery_mode=2, timestamp=int(time.time()))
    try:
        channel.basic_publish(REQUESTS, "generate", body, properties, mandatory=True)
    finally:
        with suppress(PikaError):
            connection.close()


def shares(*, light: bool, first_release: bool) -> dict[Sort, int]:
    """Return how many of a hundred requests or so are of which sort."""
    chosen = FIRST_RELEASE if first_release else SHARES
    return {sort: share for sort, share in chosen.items() if light or sort not in _LIGHT_ONLY}


def _body(number: int, sort: Sort, dose: float, other: int = 0) -> bytes:
    """Return the request: every one asks for another length, which shows whose songs these are."""
    if sort is Sort.INVALID and dose < 1 / 3:
        return b'{"prompt": "never closed'
    # What takes longer asks for more music, as it would be with a model: workers estimate the one from the other.
    songs = 2 if sort is Sort.TWO_SONGS else 1
    match sort:
        case Sort.CANCELLED:
            takes = 3 * dose
        case Sort.WORSE_DUPLICATE:
            takes = 1.5 + 2 * dose  # it is still at work when the other one comes
        case Sort.CUT_OFF:
            takes = _CUT_OFF_EXPIRES_S + 1 + 2 * dose
        case _:
            takes = songs * (0.1 + dose)
    size = (_LARGE_BYTES if sort is Sort.LARGE else _SMALL_BYTES) + 4 * (2 * number + other)
    words = [f"takes={takes:.2f}", f"bytes={size}", f"{NAME}soak-{number:05d}"]
    if sort is Sort.DEADLY:
        words.append("crash")
    fields: dict[str, Any] = {
        "task_id": f"soak-{number:05d}",
        "prompt": " ".join(words),
        "audio_format": "wav",
        "audio_duration": round(10 + 30 * takes / songs + other + number % 10 / 10, 1),  # workers cut the rest
    }
    if sort is Sort.WITHOUT_ID:
        del fields["task_id"]
    if songs > 1:
        fields["batch_size"] = songs
    if sort is Sort.INVALID:
        fields["task_type"] = "dance"
    return json.dumps(fields).encode()
