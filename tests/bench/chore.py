# SPDX-License-Identifier: Apache-2.0
"""The work that every contender does for a message; all of it is stored and confirmed before the message is acked.

``same``, by default: what the worker asks of S3 and the broker. A look for an earlier result, a ``started`` event while
the work goes on, one song and then one manifest into S3, each unless one is there, one ``completed`` event.
``least``: no more than song, manifest and ``completed`` event; what is there is overwritten.

The worker does it with its own parts. The others do it here, as one would write it by hand: one boto3 client, its
calls in threads. Bytes are the same for all: the manifest and the events below are copies of the worker's own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore.config import Config

from acestep_consumer.domain.job import Rendering, Sources, StoredObject, Track
from acestep_consumer.domain.outcome import RunInfo, manifest
from acestep_consumer.engine.adapters import DirectPlanner
from acestep_schemas.events import CONTENT_TYPE, JobCompleted, JobStarted, Started, Timings
from tests.support.admission import admitted_job
from tests.support.fake_engine import FakeRenderer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from acestep_consumer.config.settings import Settings

AUDIO = random.Random(64).randbytes(64 << 10)  # noqa: S311 - noise, not a secret
AUDIO_SHA256 = hashlib.sha256(AUDIO).hexdigest()
T = TypeVar("T")

WORKER_ID = "bench"
WORK_VARIABLE = "BENCH_WORK"
SAME, LEAST = "same", "least"
THREADS = 16
_METADATA = {
    "sha256": AUDIO_SHA256,
    "message": "0" * 32,
    "seed": "20260",
    "sample-rate": "48000",
    "channels": "2",
    "duration-s": "120.0",
}
"""As the worker's songs carry them."""

_VERSE = "A message waits in line\nA melody comes out\nThe lamp is low, the tape is wound\nThe night is all about\n"


def request_fields(task_id: str) -> dict[str, Any]:
    """Return a request as producers send it, about 700 bytes of JSON; no limit clamps it."""
    return {
        "task_id": task_id,
        "prompt": "warm lo-fi piano, brushed drums, upright bass, vinyl crackle, late at night, slow and close",
        "lyrics": f"[verse]\n{_VERSE}\n[chorus]\n{_VERSE}\n[verse]\n{_VERSE}",
        "audio_duration": 120,
        "bpm": 84,
        "key_scale": "A minor",
        "time_signature": "4",
        "vocal_language": "en",
        "inference_steps": 8,
        "seed": 20260,
        "use_random_seed": False,
        "audio_format": "wav",
    }


def song(path: Path, seed: int) -> Track:
    """Write the song's bytes to ``path``, as an encoder would."""
    path.write_bytes(AUDIO)
    return _track(path, seed)


def _track(path: Path, seed: int) -> Track:
    return Track(
        path=path,
        seed=seed,
        format="wav",
        content_type="audio/wav",
        sample_rate=48_000,
        channels=2,
        duration_s=120.0,
    )


@dataclass(frozen=True, slots=True)
class Notice:
    """An event to publish; ``persistent`` as the worker has it."""

    routing_key: str
    message_id: str
    body: bytes
    type: str
    persistent: bool
    content_type: str = CONTENT_TYPE


Publish = Callable[[Notice], Awaitable[None]]
"""Publishes an event; returns when the broker has confirmed it."""


class Chore:
    """One message's work without a framework's part in it. Make it before the event loop runs."""

    def __init__(self, settings: Settings) -> None:
        self._bucket = settings.storage.bucket
        self._prefix = settings.storage.prefix
        self._client = s3_client(settings, connections=THREADS)
        self._threads = ThreadPoolExecutor(THREADS)
        self._examples = _example_events(f"s3://{self._bucket}/{self._prefix}")
        self._least = os.environ.get(WORK_VARIABLE, SAME) == LEAST

    async def perform(self, request: dict[str, Any], publish: Publish) -> None:
        """Do all but the ack."""
        task_id = request["task_id"]
        if self._least:
            await self._generate(task_id, publish)
        elif (earlier := await self._in_thread(self._found, task_id)) is not None:
            await publish(self._completed(task_id, earlier))
        else:
            started = asyncio.create_task(_confirmed(publish(self._started(task_id))))
            await self._generate(task_id, publish, after=started)

    async def _generate(self, task_id: str, publish: Publish, after: asyncio.Task[None] | None = None) -> None:
        """Store song and manifest, the manifest last; publish the event, no sooner than ``after`` is done."""
        key = f"{self._prefix}/{task_id}/0.wav"
        await self._in_thread(self._put, key, AUDIO, "audio/wav", _METADATA)
        data = self._manifest(task_id, f"s3://{self._bucket}/{key}")
        await self._in_thread(self._put, self._manifest_key(task_id), _dumped(data), "application/json", {})
        if after is not None:
            await after
        await publish(self._completed(task_id, data))

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _found(self, task_id: str) -> dict[str, Any] | None:
        """Return the manifest of an earlier attempt."""
        try:
            found = self._client.get_object(Bucket=self._bucket, Key=self._manifest_key(task_id))
        except self._client.exceptions.NoSuchKey:
            return None
        manifest_of_earlier: dict[str, Any] = json.loads(found["Body"].read())
        return manifest_of_earlier

    def _put(self, key: str, body: bytes, content_type: str, metadata: dict[str, str]) -> None:
        more: Any = {} if self._least else {"IfNoneMatch": "*", "Metadata": metadata}
        self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type, **more)

    def _manifest_key(self, task_id: str) -> str:
        return f"{self._prefix}/{task_id}/manifest.json"

    def _manifest(self, task_id: str, uri: str) -> dict[str, Any]:
        data = self._examples["completed"]["data"]
        return {
            **data,
            "task_id": task_id,
            "finished_at": datetime.now(UTC).isoformat(),
            "audios": [{**data["audios"][0], "uri": uri}],
            "request": {**data["request"], "task_id": task_id},
        }

    def _completed(self, task_id: str, data: dict[str, Any]) -> Notice:
        return self._notice("completed", task_id, data, persistent=True)

    def _started(self, task_id: str) -> Notice:
        data = {**self._examples["started"]["data"], "task_id": task_id}
        return self._notice("started", task_id, data, persistent=False)

    def _notice(self, state: str, task_id: str, data: dict[str, Any], *, persistent: bool) -> Notice:
        example, number, now = self._examples[state], str(uuid.uuid4()), datetime.now(UTC).isoformat()
        event = {**example, "id": number, "subject": task_id, "time": now, "data": data}
        return Notice(f"job.{state}.{task_id}", number, _dumped(event), example["type"], persistent)


async def _confirmed(publishing: Awaitable[None]) -> None:
    await publishing


def s3_client(settings: Settings, *, connections: int) -> S3Client:
    """Return a boto3 client as one sets it up for any S3-compatible store."""
    return boto3.client(
        "s3",
        endpoint_url=settings.storage.endpoint,
        config=Config(
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 3},
            max_pool_connections=connections,
            s3={"addressing_style": "path"},
        ),
    )


def _example_events(place: str) -> dict[str, dict[str, Any]]:
    """Return the events that the worker would publish for a message, by state, made by its own code."""
    task_id = str(uuid.UUID(int=0))
    job = admitted_job(**request_fields(task_id))
    plan = asyncio.run(DirectPlanner(FakeRenderer()).plan(job, Sources(), lambda _fraction, _stage: None))
    track = _track(Path("0.wav"), job.seeds[0])
    stored = StoredObject(track=track, uri=f"{place}/{task_id}/0.wav", url=None, bytes=len(AUDIO), sha256=AUDIO_SHA256)
    timings = Timings(queued=1.234, plan=0.001, render=0.001, encode=0.001, upload=0.012, total=0.034)
    rendering = Rendering(tracks=(track,), render_s=0.0, encode_s=0.0)
    scene = RunInfo(WORKER_ID, 1, datetime.now(UTC))
    started = Started(
        task_id=task_id, attempt=1, worker_id=WORKER_ID, model=job.model, lm=job.lm, policy=job.policy, expected_s=0.1
    )
    completed = JobCompleted.of(manifest(job, plan, rendering, (stored,), timings, scene))
    return {
        "started": JobStarted.of(started).model_dump(mode="json"),
        "completed": completed.model_dump(mode="json"),
    }


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
