# SPDX-License-Identifier: Apache-2.0
"""The work that every contender does for a message: one song and one manifest into S3, one event to say so.

The worker does it with its own parts. The others do it here, as one would write it by hand: one boto3 client, its
calls in threads. Bytes are the same for all: the manifest and the event below are copies of the worker's own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from acestep_consumer.domain.job import Rendering, Sources, StoredObject, Track
from acestep_consumer.domain.outcome import RunInfo, manifest
from acestep_consumer.engine.adapters import DirectPlanner
from acestep_schemas.events import CONTENT_TYPE, JobCompleted, Timings
from tests.support.admission import admitted_job
from tests.support.fake_engine import FakeRenderer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from acestep_consumer.config.settings import Settings

AUDIO = random.Random(64).randbytes(64 << 10)  # noqa: S311 - noise, not a secret
AUDIO_SHA256 = hashlib.sha256(AUDIO).hexdigest()
WORKER_ID = "bench"
THREADS = 16
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
    """What is left to do for a message: publish this, then ack."""

    routing_key: str
    message_id: str
    body: bytes
    type: str = "acestep.job.completed.v1"
    content_type: str = CONTENT_TYPE


class Chore:
    """One message's work without a framework's part in it. Make it before the event loop runs."""

    def __init__(self, settings: Settings) -> None:
        self._bucket = settings.storage.bucket
        self._prefix = settings.storage.prefix
        self._client = s3_client(settings, connections=THREADS)
        self._threads = ThreadPoolExecutor(THREADS)
        self._example = _example_event(f"s3://{self._bucket}/{self._prefix}")

    async def perform(self, request: dict[str, Any]) -> Notice:
        """Store song and manifest, the manifest last, and return the event."""
        task_id = request["task_id"]
        key = f"{self._prefix}/{task_id}/0.wav"
        await self._put(key, AUDIO, "audio/wav")
        event = self._event(task_id, f"s3://{self._bucket}/{key}")
        await self._put(f"{self._prefix}/{task_id}/manifest.json", _dumped(event["data"]), "application/json")
        return Notice(f"job.completed.{task_id}", event["id"], _dumped(event))

    async def _put(self, key: str, body: bytes, content_type: str) -> None:
        def put() -> None:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type)

        await asyncio.get_running_loop().run_in_executor(self._threads, put)

    def _event(self, task_id: str, uri: str) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat()
        example = self._example
        data = example["data"]
        return {
            **example,
            "id": str(uuid.uuid4()),
            "subject": task_id,
            "time": now,
            "data": {
                **data,
                "task_id": task_id,
                "finished_at": now,
                "audios": [{**data["audios"][0], "uri": uri}],
                "request": {**data["request"], "task_id": task_id},
            },
        }


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


def _example_event(place: str) -> dict[str, Any]:
    """Return the event that the worker would publish for a message, made by its own code."""
    task_id = str(uuid.UUID(int=0))
    job = admitted_job(**request_fields(task_id))
    plan = asyncio.run(DirectPlanner(FakeRenderer()).plan(job, Sources(), lambda _fraction, _stage: None))
    track = _track(Path("0.wav"), job.seeds[0])
    stored = StoredObject(track=track, uri=f"{place}/{task_id}/0.wav", url=None, bytes=len(AUDIO), sha256=AUDIO_SHA256)
    timings = Timings(queued=1.234, plan=0.001, render=0.001, encode=0.001, upload=0.012, total=0.034)
    rendering = Rendering(tracks=(track,), render_s=0.0, encode_s=0.0)
    scene = RunInfo(WORKER_ID, 1, datetime.now(UTC))
    event = JobCompleted.of(manifest(job, plan, rendering, (stored,), timings, scene))
    example: dict[str, Any] = event.model_dump(mode="json")
    return example


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
