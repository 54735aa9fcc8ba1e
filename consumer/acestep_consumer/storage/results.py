# SPDX-License-Identifier: Apache-2.0
"""Results of jobs: ``<prefix>/<task_id>/<index>.<ext>``, then ``manifest.json``, which marks the job as done.

Every audio object is written once, and carries the fingerprint of the message that it was made for. A later attempt at
the same message, after a crash or in a race, takes it over with its checksum and seed. Another message with the same
task id writes beside it, as ``<index>-<fingerprint>.<ext>``: so a manifest stays true, whatever happens after it was
written. A job without songs leaves a manifest too: this record is why a message has one terminal event, whichever
worker publishes it.
"""

import asyncio
import hashlib
import os
import re
import uuid
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
from pydantic import ValidationError

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import ManifestUnreadable, StorageRefused, StorageUnavailable
from acestep_consumer.domain.job import Job, Rendering, StoredObject, Track
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent, ObjectHead, SmallObject
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.domain.ports import Objects
from acestep_schemas.events import Completed, parse_manifest
from acestep_schemas.request import TASK_ID_PATTERN

T = TypeVar("T")

MANIFEST: Final = "manifest.json"
NO_BUCKET: Final = "correct ACESTEP_S3_BUCKET, create the bucket, or set ACESTEP_S3_CREATE_BUCKET=true"

_log = structlog.get_logger()
_TASK_ID: Final = re.compile(TASK_ID_PATTERN)
_TRANSFERS: Final = 16
_IN_MEMORY_BYTES: Final = 1 << 20
_MESSAGE: Final = "message"
_TRACE: Final = "traceparent"
_BODY: Final = "body-sha256"
_SHA256: Final = "sha256"
_COMMIT_TRIES: Final = 8
_SHORT: Final = 8
"""Digits of a fingerprint in a name."""


def object_key(prefix: str, task_id: str, name: str) -> str:
    """Return the key of one of a job's objects. Raises ``ValueError`` for an id that could leave its folder."""
    if not _TASK_ID.fullmatch(task_id):
        raise ValueError(f"not a task id: {task_id[:128]!r}")
    return _join(prefix, task_id, name)


def track_name(index: int | str, track: Track) -> str:
    """Return the last part of a song's key: its index and the ending that the encoder gave it."""
    return f"{index}{track.path.suffix.lower()}"


class ResultStore:
    """``ports.Store`` on an object storage."""

    def __init__(self, objects: Objects, settings: StorageSettings) -> None:
        self._objects = objects
        self._bucket = settings.bucket
        self._prefix = settings.prefix
        self._create_bucket = settings.create_bucket
        self._presign_s = settings.presign_s
        # About a megabyte of each song is in memory while it is sent.
        self._transfers = asyncio.Semaphore(_TRANSFERS)

    async def find(self, task_id: str) -> TerminalRecord | None:
        """Return how a task ended, if it did. Raises ``StorageUnavailable``."""
        place = self._place(task_id, MANIFEST)
        found = await self._objects.get(place)
        return None if found is None else _read_manifest(place, task_id, found)

    async def put(self, job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        """Upload the tracks under their final keys, or take over the ones there. Raises ``StorageUnavailable``."""
        return await _together(self._put_track(job, index, track) for index, track in enumerate(rendering.tracks))

    async def missing(self, record: TerminalRecord) -> bool:
        """Whether audio of a completed task is gone, or is another one. Raises ``StorageUnavailable``."""
        if not isinstance(record.ending, Completed):
            return False
        heads = await _together(self._objects.head(ObjectAddress.of(audio.uri)) for audio in record.ending.audios)
        pairs = zip(heads, record.ending.audios, strict=True)
        return any(head is None or head.metadata.get(_SHA256) != audio.sha256 for head, audio in pairs)

    async def commit(self, record: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        """Write a task's terminal record, and return the one in force. Raises ``StorageUnavailable``.

        A completed task stays completed; a completed record replaces one without songs; of two without songs, the
        latest message's counts. ``instead_of`` is an earlier record to replace in any case.
        """
        place = self._place(record.ending.task_id, MANIFEST)
        content = _manifest(record)
        for _ in range(_COMMIT_TRIES):
            if await self._objects.put(place, content, only_new=True):
                return record
            found = await self._objects.get(place)
            if found is None:
                continue
            winner = _read_manifest(place, record.ending.task_id, found)
            if winner != instead_of and not winner.yields_to(record):
                return winner
            if await self._objects.replace(place, content, found.etag):
                return record
        raise StorageUnavailable(f"{place} changed at each of {_COMMIT_TRIES} tries: something else writes manifests")

    async def check(self) -> None:
        """Try at the start what storing results takes: a bucket, a write, a read, a delete.

        A missing bucket is created if ACESTEP_S3_CREATE_BUCKET says so: a typo in its name must not create one.

        Raises:
            StorageUnavailable: names the bucket and the storage's answer.
        """
        if not await self._objects.has_bucket(self._bucket):
            if not self._create_bucket:
                raise StorageRefused(ObjectAddress(self._bucket), "NoSuchBucket", hint=NO_BUCKET)
            await self._objects.make_bucket(self._bucket)
            _log.info("storage.bucket_created", bucket=self._bucket)
        place = ObjectAddress(self._bucket, _join(self._prefix, f".check-{uuid.uuid4().hex}"))
        body = uuid.uuid4().bytes
        await self._objects.put(place, ObjectContent.of(body, "application/octet-stream"))
        read = await self._objects.get(place)
        if read is None or read.body != body:
            raise StorageUnavailable(f"{place} does not read as it was written")
        await self._objects.check_conditions(place)
        try:
            await self._objects.delete(place)
        except StorageRefused as error:
            # Only records of attempts are deleted else, which may stay: keys without the permission are good enough.
            _log.warning("storage.check_left_behind", object=str(place), reason=error.reason)

    async def ready(self) -> None:
        """Ask for the bucket, which is cheap enough for every probe. Raises ``StorageUnavailable``."""
        if not await self._objects.has_bucket(self._bucket):
            raise StorageUnavailable(f"s3://{self._bucket}: NoSuchBucket")

    async def _put_track(self, job: Job, index: int, track: Track) -> StoredObject:
        async with self._transfers:
            content = await asyncio.to_thread(_content, track, job)
            stored = await self._write(job, track_name(index, track), track, content)
            if stored is None:
                beside = track_name(f"{index}-{job.message[:_SHORT]}", track)
                stored = await self._write(job, beside, track, content)
            if stored is None:
                raise StorageUnavailable(f"{self._place(job.task_id, beside)} belongs to another message")
        if not self._presign_s:
            return stored
        return replace(stored, url=await self._objects.presign(ObjectAddress.of(stored.uri), self._presign_s))

    async def _write(self, job: Job, name: str, track: Track, content: ObjectContent) -> StoredObject | None:
        """Write a song, or take over the one that an earlier attempt at this message wrote. None: another message's."""
        place = self._place(job.task_id, name)
        ours = StoredObject(track=track, uri=str(place), url=None, bytes=content.size, sha256=content.sha256)
        if await self._objects.put(place, content, only_new=True):
            return ours
        head = await self._objects.head(place)
        if head is not None and _SHA256 in head.metadata:
            return _take_over(place, track, head) if head.metadata.get(_MESSAGE) == job.message else None
        # It lacks our metadata: no worker wrote it, and no manifest names it.
        _log.warning("storage.foreign_object_replaced", object=str(place))
        await self._objects.put(place, content)
        return ours

    def _place(self, task_id: str, name: str) -> ObjectAddress:
        return ObjectAddress(self._bucket, object_key(self._prefix, task_id, name))


def _take_over(place: ObjectAddress, track: Track, head: ObjectHead) -> StoredObject | None:
    """Describe the song of an earlier attempt from its metadata; None when these cannot be read."""
    try:
        earlier = replace(
            track,
            seed=int(head.metadata["seed"]),
            sample_rate=int(head.metadata["sample-rate"]),
            channels=int(head.metadata["channels"]),
            duration_s=float(head.metadata["duration-s"]),
        )
    except (KeyError, ValueError):
        return None
    return StoredObject(track=earlier, uri=str(place), url=None, bytes=head.size, sha256=head.metadata[_SHA256])


def _read_manifest(place: ObjectAddress, task_id: str, found: SmallObject) -> TerminalRecord:
    try:
        ending = parse_manifest(found.body)
    except ValidationError as error:
        raise ManifestUnreadable(f"{place} is not a manifest that can be read") from error
    if ending.task_id != task_id:
        raise ManifestUnreadable(f"{place} is the manifest of another task, {ending.task_id}")
    metadata = found.metadata
    # What this version does not know is lost in ``ending``, and repeated all the same.
    known = ending.model_dump_json(warnings=False).encode() == found.body
    return TerminalRecord(
        ending,
        metadata.get(_MESSAGE),
        metadata.get(_TRACE),
        metadata.get(_BODY),
        data_json=None if known else found.body,
    )


def _manifest(record: TerminalRecord) -> ObjectContent:
    named = {_MESSAGE: record.message, _TRACE: record.traceparent, _BODY: record.body}
    metadata = {name: value for name, value in named.items() if value is not None}
    return ObjectContent.of(record.ending.model_dump_json().encode(), "application/json", metadata)


def _content(track: Track, job: Job) -> ObjectContent:
    """Describe a song's file. The metadata are what a later attempt needs to take the object over."""
    size, sha256, body = _measure(track.path)
    metadata = {
        _SHA256: sha256,
        _MESSAGE: job.message,
        "seed": str(track.seed),
        "sample-rate": str(track.sample_rate),
        "channels": str(track.channels),
        "duration-s": repr(track.duration_s),
        **({_TRACE: job.traceparent} if job.traceparent else {}),
    }
    return ObjectContent(body=body, size=size, sha256=sha256, content_type=track.content_type, metadata=metadata)


def _measure(path: Path) -> tuple[int, str, bytes | Path]:
    """Return size, digest and content: bytes in memory if they are few, which saves reading them a second time."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _IN_MEMORY_BYTES:
            return size, hashlib.file_digest(file, "sha256").hexdigest(), path
        body = file.read()
    return len(body), hashlib.sha256(body).hexdigest(), body


def _join(*parts: str) -> str:
    return "/".join(stripped for part in parts if (stripped := part.strip("/")))


async def _together(calls: Iterable[Coroutine[Any, Any, T]]) -> tuple[T, ...]:
    """Run the calls at once; the first failure ends the others and is raised as it is, not in a group."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
