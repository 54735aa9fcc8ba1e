# SPDX-License-Identifier: Apache-2.0
"""A store in memory that behaves as S3 does; the contract tests hold it to that."""

import hashlib
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.domain.job import Job, Rendering, StoredObject, Track
from acestep_consumer.domain.outcome import Ending, TerminalRecord
from acestep_consumer.storage.results import MANIFEST, object_key, track_name

_ENDING: TypeAdapter[Ending] = TypeAdapter(Ending)


@dataclass
class FakeStore:
    """``ports.Store`` without a server. ``down`` makes every call fail, as an outage that outlasts all patience.

    ``objects`` holds all bytes by key, manifests among them, for a test to look at.
    """

    bucket: str = "fake"
    prefix: str = "jobs"
    down: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)
    _stored: dict[str, StoredObject] = field(default_factory=dict)
    _kept: dict[str, TerminalRecord] = field(default_factory=dict)

    async def find(self, task_id: str) -> TerminalRecord | None:
        self._answer()
        key = self._key(task_id, MANIFEST)
        if key not in self.objects:
            return None
        return replace(self._kept[key], ending=_ENDING.validate_json(self.objects[key]))

    async def put(self, job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        self._answer()
        return tuple(self._put(job.task_id, index, track) for index, track in enumerate(rendering.tracks))

    async def commit(self, kept: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        found = await self.find(kept.ending.task_id)
        if found is not None and found != instead_of:
            return found
        key = self._key(kept.ending.task_id, MANIFEST)
        self.objects[key], self._kept[key] = kept.ending.model_dump_json().encode(), kept
        return kept

    def _put(self, task_id: str, index: int, track: Track) -> StoredObject:
        key = self._key(task_id, track_name(index, track))
        if key not in self.objects:
            body = self.objects[key] = track.path.read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            uri = f"s3://{self.bucket}/{key}"
            self._stored[key] = StoredObject(track=track, uri=uri, url=None, bytes=len(body), sha256=digest)
        return self._stored[key]

    def _key(self, task_id: str, name: str) -> str:
        return object_key(self.prefix, task_id, name)

    def _answer(self) -> None:
        if self.down:
            raise StorageUnavailable("s3://fake: the store is down")
