# SPDX-License-Identifier: Apache-2.0
"""Results of jobs: ``<prefix>/<task_id>/<index>.<ext>``, files beside it, and last ``manifest.json``: the job is done.

Every audio object is written once, and carries the fingerprint of the message that it was made for. A later attempt at
the same message, after a crash or in a race, takes it over with its checksum and seed. Another message with the same
task id writes beside it, as ``<index>-<fingerprint>.<ext>``: so a manifest stays true, whatever happens after it was
written. A job without songs leaves a manifest too: this record is why a message has one terminal event, whichever
worker publishes it.
"""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import structlog
from pydantic import ValidationError

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.errors import ManifestUnreadable, StorageRefused, StorageUnavailable
from acestep_consumer.domain.job import (
    SIDE_FILE_SUFFIXES,
    Job,
    Rendering,
    SideFile,
    StoredObject,
    StoredSideFile,
    Track,
)
from acestep_consumer.domain.objects import (
    MANIFEST,
    ObjectAddress,
    ObjectContent,
    ObjectHead,
    SmallObject,
    join_key,
    object_key,
)
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.domain.ports import Objects
from acestep_schemas.events import Completed, parse_manifest
from acestep_schemas.request import is_task_id

T = TypeVar("T")

CHILDREN: Final = "children"
"""Folder below a task's, with a small object for each task whose songs come from its songs, named after it."""
NO_BUCKET: Final = (
    "correct ACESTEP_S3_BUCKET (ACESTEP_S3_ENDPOINT is without its name), create the bucket, or set "
    "ACESTEP_S3_CREATE_BUCKET=true"
)

log = structlog.get_logger()
_TRANSFERS: Final = 16
_IN_MEMORY_BYTES: Final = 1 << 20
_MESSAGE: Final = "message"
_TRACE: Final = "traceparent"
_BODY: Final = "body-sha256"
_SHA256: Final = "sha256"
_SONG_METADATA: Final[Mapping[str, Callable[[str], Any]]] = {
    "seed": int,
    "sample-rate": int,
    "channels": int,
    "duration-s": float,
}
"""Names of ``Track``'s fields, with hyphens."""
_NO_SONG: Final[Mapping[str, str]] = MappingProxyType({})
_COMMIT_TRIES: Final = 8
_SHORT: Final = 8
"""Digits of a fingerprint in a name."""


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

    async def children(self, task_id: str) -> AsyncIterator[str]:
        """Yield the tasks whose songs come from this one's, as far as noted. Raises ``StorageUnavailable``."""
        folder = self._place(task_id, CHILDREN)
        start = ObjectAddress(folder.bucket, f"{folder.key}/")
        async for address in self._objects.list(start):
            child = address.key.removeprefix(start.key)
            if is_task_id(child):
                yield child

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
        latest message's counts. ``instead_of`` is the earlier record that this one was made in place of: songs whose
        audio is gone are replaced by new ones, and by nothing else.
        """
        place = self._place(record.ending.task_id, MANIFEST)
        content = _manifest(record)
        if isinstance(record.ending, Completed):
            await self._mark_children(record.ending)
        for _ in range(_COMMIT_TRIES):
            if await self._objects.put(place, content, only_new=True):
                return record
            found = await self._objects.get(place)
            if found is None:
                continue
            winner = _read_manifest(place, record.ending.task_id, found)
            if not winner.yields_to(record, instead_of):
                return winner
            if await self._objects.replace(place, content, found.etag):
                return record
        raise StorageUnavailable(f"{place} changed at each of {_COMMIT_TRIES} tries: something else writes manifests")

    async def _mark_children(self, ending: Completed) -> None:
        """Leave a note at each song that these come from, for ``acestep-consumer lineage``: best effort.

        Before the manifest: a note of a task that has none yet is ignored, and a missing one is not found again.
        """
        for parent in ending.parents:
            note = ObjectContent.of(parent.model_dump_json().encode(), "application/json")
            try:
                await self._objects.put(self._place(parent.task_id, f"{CHILDREN}/{ending.task_id}"), note)
            except StorageUnavailable as error:
                log.warning("source song does not list what came from it", parent=parent.task_id, reason=str(error))

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
            log.info("bucket created", bucket=self._bucket)
        place = ObjectAddress(self._bucket, join_key(self._prefix, f".check-{uuid.uuid4().hex}"))
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
            log.warning("start-up check leaves an object", object=str(place), reason=error.reason)

    async def ready(self) -> None:
        """Ask for the bucket, which is cheap enough for every probe. Raises ``StorageUnavailable``."""
        if not await self._objects.has_bucket(self._bucket):
            raise StorageUnavailable(f"s3://{self._bucket}: NoSuchBucket")

    async def _put_track(self, job: Job, index: int, track: Track) -> StoredObject:
        # The song last: where it is taken over from an earlier attempt, what lies beside it is that attempt's, too.
        side_files = await _together(self._put_side_file(job, index, each) for each in track.side_files)
        return replace(await self._put_song(job, index, track), side_files=side_files)

    async def _put_song(self, job: Job, index: int, track: Track) -> StoredObject:
        async with self._transfers:
            content = await asyncio.to_thread(_content, track, job)
            written = await self._put_file(job, index, track.path.suffix.lower(), content)
        return StoredObject(
            track=track if written.head is None else _track_of_earlier_attempt(track, written.head),
            uri=written.uri,
            url=await self._url(written),
            bytes=written.bytes,
            sha256=written.sha256,
        )

    async def _put_side_file(self, job: Job, index: int, file: SideFile) -> StoredSideFile:
        async with self._transfers:
            content = await asyncio.to_thread(_content_of, file.path, file.content_type, job)
            written = await self._put_file(job, index, SIDE_FILE_SUFFIXES[file.kind], content)
        return StoredSideFile(
            kind=file.kind,
            content_type=file.content_type,
            uri=written.uri,
            url=await self._url(written),
            bytes=written.bytes,
            sha256=written.sha256,
        )

    async def _put_file(self, job: Job, index: int, suffix: str, content: ObjectContent) -> "_Written":
        """Write ``<index><suffix>``, or beside it where that name belongs to another message."""
        for name in (f"{index}{suffix}", f"{index}-{job.message[:_SHORT]}{suffix}"):
            if (written := await self._write(job, name, content)) is not None:
                return written
        raise StorageUnavailable(f"{self._place(job.task_id, name)} belongs to another message")

    async def _write(self, job: Job, name: str, content: ObjectContent) -> "_Written | None":
        """Write an object, or take over the one that an earlier attempt at this message wrote.

        None: it is another message's.
        """
        place = self._place(job.task_id, name)
        ours = _Written(place, content.size, content.sha256)
        if await self._objects.put(place, content, only_new=True):
            return ours
        head = await self._objects.head(place)
        if head is not None and _SHA256 in head.metadata:
            is_ours = head.metadata.get(_MESSAGE) == job.message and _describes(head, content)
            return _Written(place, head.size, head.metadata[_SHA256], head) if is_ours else None
        # It lacks our metadata: no worker wrote it, and no manifest names it.
        log.warning("object that no worker wrote replaced", object=str(place))
        await self._objects.put(place, content)
        return ours

    async def _url(self, written: "_Written") -> str | None:
        return await self._objects.presign(written.place, self._presign_s) if self._presign_s else None

    def _place(self, task_id: str, name: str) -> ObjectAddress:
        return ObjectAddress(self._bucket, object_key(self._prefix, task_id, name))


@dataclass(frozen=True, slots=True)
class _Written:
    """An object that is stored; ``head`` describes one that an earlier attempt wrote."""

    place: ObjectAddress
    bytes: int
    sha256: str
    head: ObjectHead | None = None

    @property
    def uri(self) -> str:
        return str(self.place)


def _describes(head: ObjectHead, content: ObjectContent) -> bool:
    """Whether an object's metadata can be read as far as those of ``content`` tell of a song."""
    try:
        for name in _SONG_METADATA.keys() & content.metadata.keys():
            _SONG_METADATA[name](head.metadata[name])
    except (KeyError, ValueError):
        return False
    return True


def _track_of_earlier_attempt(track: Track, head: ObjectHead) -> Track:
    read = {name.replace("-", "_"): convert(head.metadata[name]) for name, convert in _SONG_METADATA.items()}
    return replace(track, **read)


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
    song = {name: str(getattr(track, name.replace("-", "_"))) for name in _SONG_METADATA}
    return _content_of(track.path, track.content_type, job, song)


def _content_of(path: Path, content_type: str, job: Job, song: Mapping[str, str] = _NO_SONG) -> ObjectContent:
    size, sha256, body = _measure(path)
    trace = {_TRACE: job.traceparent} if job.traceparent else {}
    metadata = {_SHA256: sha256, _MESSAGE: job.message, **song, **trace}
    return ObjectContent(body=body, size=size, sha256=sha256, content_type=content_type, metadata=metadata)


def _measure(path: Path) -> tuple[int, str, bytes | Path]:
    """Return size, digest and content: bytes in memory if they are few, which saves reading them a second time."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _IN_MEMORY_BYTES:
            return size, hashlib.file_digest(file, "sha256").hexdigest(), path
        body = file.read()
    return len(body), hashlib.sha256(body).hexdigest(), body


async def _together(calls: Iterable[Coroutine[Any, Any, T]]) -> tuple[T, ...]:
    """Run the calls at once; the first failure ends the others and is raised as it is, not in a group."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
