# SPDX-License-Identifier: Apache-2.0
"""The family of a task: the tasks that its songs come from, and those that come from them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from acestep_consumer.domain.errors import ManifestUnreadable
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_consumer.storage.results import ResultStore
from acestep_schemas.events import Audio, Completed, ParentSong
from acestep_schemas.request import is_task_id

MOST_TASKS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Relation:
    """A task whose songs come from a song of an earlier one."""

    child: str
    parent: ParentSong


@dataclass(slots=True)
class Family:
    """Ancestors and descendants of a task, itself among them.

    Attributes:
        tasks: the manifest of each; None: it was deleted, cannot be read, or the task has not ended.
        unreadable: those whose manifest cannot be read, so that what they come from is not known.
        complete: whether these are all; no more than ``MOST_TASKS`` are read.
    """

    tasks: dict[str, Completed | None] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    complete: bool = True

    @property
    def relations(self) -> list[Relation]:
        """Child and parent of each relation among these tasks."""
        return [
            Relation(child, parent)
            for child, found in self.tasks.items()
            for parent in (found.parents if found else ())
            if parent.task_id in self.tasks
        ]

    def children_of(self, task_id: str) -> list[Relation]:
        """Return the relations in which a task is the parent."""
        return [each for each in self.relations if each.parent.task_id == task_id]

    @property
    def first(self) -> list[str]:
        """The tasks that come from no other one."""
        children = {each.child for each in self.relations}
        return [task_id for task_id in self.tasks if task_id not in children]

    def listed(self, task_id: str, place: Callable[[str, Audio], str]) -> dict[str, Any]:
        """Return JSON: the task that was asked for, whether these are all, and the tasks, oldest first.

        ``place`` says where a song of a task is.
        """
        ordered = sorted(self.tasks.items(), key=lambda item: (item[1] is not None, time_of(item[1])))
        tasks = [
            {
                "task_id": each,
                "found": ending is not None,
                "finished_at": None if ending is None else ending.finished_at.isoformat(),
                "task_type": None if ending is None else ending.request.task_type,
                "prompt": None if ending is None else ending.request.prompt,
                "songs": None if ending is None else [place(each, audio) for audio in ending.audios],
                "parents": [] if ending is None else [parent.model_dump(mode="json") for parent in ending.parents],
            }
            for each, ending in ordered
        ]
        return {"task_id": task_id, "complete": self.complete, "tasks": tasks}


def time_of(ending: Completed | None) -> str:
    """Return when a task ended, for sorting; of one that was deleted nothing is known."""
    return "" if ending is None else ending.finished_at.isoformat()


async def family_of(task_id: str, store: ResultStore) -> Family:
    """Read the family of a task.

    Raises:
        StorageUnavailable: a manifest cannot be fetched.
        ManifestUnreadable: that of the task itself cannot be read. Without that of a relative the others are a family.
    """
    family = Family({task_id: _completed(await store.find(task_id))})
    await _add_ancestors(task_id, store, family)
    await _add_descendants(task_id, store, family)
    return family


async def _add_ancestors(task_id: str, store: ResultStore, family: Family) -> None:
    waiting = deque([task_id])
    while waiting:
        found = family.tasks[waiting.popleft()]
        for parent in found.parents if found else ():
            if parent.task_id in family.tasks or _is_full(family):
                continue
            family.tasks[parent.task_id] = await _relative(parent.task_id, store, family)
            waiting.append(parent.task_id)


async def _add_descendants(task_id: str, store: ResultStore, family: Family) -> None:
    waiting = deque([task_id])
    while waiting:
        each = waiting.popleft()
        async for child in store.children(each):
            if child in family.tasks:
                continue
            if _is_full(family):
                return
            found = await _relative(child, store, family)
            if child in family.unreadable:
                family.tasks[child] = None
            # If not, it has not ended, was deleted, or is another task of that id by now.
            elif found is not None and any(parent.task_id == each for parent in found.parents):
                family.tasks[child] = found
                waiting.append(child)


async def _relative(task_id: str, store: ResultStore, family: Family) -> Completed | None:
    if not is_task_id(task_id):  # a manifest can name anything, and no task has this id
        return None
    try:
        return _completed(await store.find(task_id))
    except ManifestUnreadable:
        family.unreadable.add(task_id)
        return None


def _completed(record: TerminalRecord | None) -> Completed | None:
    return record.ending if record is not None and isinstance(record.ending, Completed) else None


def _is_full(family: Family) -> bool:
    family.complete = family.complete and len(family.tasks) < MOST_TASKS
    return not family.complete
