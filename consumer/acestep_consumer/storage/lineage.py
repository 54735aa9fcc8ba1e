# SPDX-License-Identifier: Apache-2.0
"""The family of a task: the tasks that its songs come from, and those that come from them."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from acestep_consumer.storage.results import ResultStore
from acestep_schemas.events import Completed, ParentSong

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
        tasks: the manifest of each; None: it was deleted, or the task has not ended.
        relations: who comes from whom.
        complete: whether these are all; no more than ``MOST_TASKS`` are read.
    """

    tasks: dict[str, Completed | None] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    complete: bool = True

    def children_of(self, task_id: str) -> list[Relation]:
        """Return the relations in which a task is the parent."""
        return [each for each in self.relations if each.parent.task_id == task_id]

    @property
    def first(self) -> list[str]:
        """The tasks that come from no other one."""
        children = {each.child for each in self.relations}
        return [task_id for task_id in self.tasks if task_id not in children]


async def family_of(task_id: str, store: ResultStore) -> Family:
    """Read the family of a task. Raises ``StorageUnavailable``."""
    family = Family()
    await _add_ancestors(task_id, store, family)
    await _add_descendants(task_id, store, family)
    return family


async def _add_ancestors(task_id: str, store: ResultStore, family: Family) -> None:
    waiting = deque([task_id])
    while waiting:
        each = waiting.popleft()
        if each in family.tasks or _is_full(family):
            continue
        found = family.tasks[each] = await _completed(each, store)
        for parent in found.parents if found else ():
            family.relations.append(Relation(each, parent))
            waiting.append(parent.task_id)


async def _add_descendants(task_id: str, store: ResultStore, family: Family) -> None:
    waiting = deque([task_id])
    while waiting:
        each = waiting.popleft()
        async for child in store.children(each):
            known = child in family.tasks  # by another of its parents, too: a song made again comes from two
            if not known and _is_full(family):
                continue
            found = family.tasks[child] if known else await _completed(child, store)
            relations = [Relation(child, parent) for parent in found.parents if parent.task_id == each] if found else []
            family.relations += [relation for relation in relations if relation not in family.relations]
            if known or not relations:
                continue  # or it has not ended, was deleted, or is another task of that id by now
            family.tasks[child] = found
            waiting.append(child)


async def _completed(task_id: str, store: ResultStore) -> Completed | None:
    record = await store.find(task_id)
    return record.ending if record is not None and isinstance(record.ending, Completed) else None


def _is_full(family: Family) -> bool:
    family.complete = family.complete and len(family.tasks) < MOST_TASKS
    return not family.complete
