# SPDX-License-Identifier: Apache-2.0
"""Looks up the songs of earlier tasks that a request names, by their manifests, and resolves the request against them.

It comes before admission: what a song is made from, and how long it is, decides about limits.
"""

from dataclasses import replace

from acestep_consumer.domain import edits
from acestep_consumer.domain.edits import FoundSong
from acestep_consumer.domain.errors import InputNotAllowed, InputUnreadable, InvalidRequest, ManifestUnreadable
from acestep_consumer.domain.job import Request
from acestep_consumer.domain.ports import Store
from acestep_consumer.domain.tasks import TASKS
from acestep_schemas.events import Completed, ParentSong
from acestep_schemas.request import FieldProblem, GenerationRequest


class StoredSongs:
    """``ports.SourceSongs`` on the store of results.

    Args:
        store: has the manifests.
        allowed: whether results may be inputs (``ACESTEP_INPUT_RESULTS``).
    """

    def __init__(self, store: Store, *, allowed: bool) -> None:
        self._store = store
        self.allowed = allowed

    async def resolve(self, request: Request) -> Request:
        """Return the request with what follows from the song that it names, and from its edits.

        Raises:
            InvalidRequest: edits that contradict each other, or a song that does not have what they need.
            InputNotAllowed: results are no inputs on this worker.
            InputUnreadable: there is no such song.
        """
        asked = request.body
        if not edits.concerns(asked):
            return request
        edits.check(asked)
        if asked.source_task_id is None:
            return edits.resolve(asked, None).applied_to(request)
        song = await self._find(asked)
        found = edits.resolve(asked, song)
        source, named = found.source, next(iter(_named(asked)))
        parents = [ParentSong(task_id=asked.source_task_id, index=asked.source_index, field=named)]
        if source is None and found.request.source_task_id is not None and _uses_source(found.request):
            # The song is made again, and was made from another one itself.
            source = (await self._find(found.request)).as_source()
            parents.append(ParentSong(task_id=source.task_id, index=source.index, field="source_task_id"))
        return replace(found.applied_to(request), source=source, parents=tuple(parents))

    async def _find(self, asked: GenerationRequest) -> FoundSong:
        """Return the song that the fields ``source_task_id`` and ``source_index`` name."""
        task_id, index = asked.source_task_id or "", asked.source_index
        what = f"source_task_id = {task_id}"
        if not self.allowed:
            raise InputNotAllowed(f"{what}: results are no inputs on this worker (ACESTEP_INPUT_RESULTS=none)")
        try:
            record = await self._store.find(task_id)
        except ManifestUnreadable as error:  # another try reads the same
            raise InputUnreadable(f"{what}: the manifest of this task cannot be read; make the song again") from error
        if record is None:
            raise InputUnreadable(
                f"{what}: the storage has no result of this task. Either it has not ended yet: wait for its completed "
                "event; or its objects were deleted, or the id is wrong"
            )
        ending = record.ending
        if not isinstance(ending, Completed):
            raise InputUnreadable(f"{what}: this task ended without songs: {ending.status}, {ending.error.message}")
        if index >= len(ending.audios):
            songs = len(ending.audios)
            rule = f"must be below {songs}: that task has so many songs" if songs else "that task has no songs"
            raise InvalidRequest([FieldProblem(field="source_index", value=str(index), rule=rule)])
        return FoundSong(ending, index)


def _named(asked: GenerationRequest) -> tuple[str, ...]:
    """Return the fields that say what becomes of the song, the one that counts first."""
    named = tuple(edits.names(asked))
    if not named and edits.is_made_again(asked):
        return ("quality",)
    return (*named, "source_task_id")


def _uses_source(request: GenerationRequest) -> bool:
    return TASKS[request.task_type].uses_source(request)
