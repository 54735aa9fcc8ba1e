# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer lineage`: prints what a song was made from, and what was made from it."""

import json
import sys
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from acestep_consumer.client.results import Results
from acestep_consumer.commands.base import print_error, print_warning
from acestep_consumer.commands.terminal import plural
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.storage.lineage import MOST_TASKS, Family, Relation, family_of
from acestep_consumer.storage.results import ResultStore
from acestep_schemas.events import Completed

_RETRY_S: Final = 10.0
_SHOWN: Final = 60
_UNWRAPPED: Final = 10_000


async def lineage(settings: Settings, task_id: str, note: Console, *, as_json: bool) -> Exit:
    """Print the family of a task: ``JOB_FAILED`` where the storage has no such task."""
    results = Results(settings.storage, retry_s=_RETRY_S)
    try:
        family = await family_of(task_id, ResultStore(await results.objects(), settings.storage))
    except StorageUnavailable as error:
        print_error(str(error), note)
        return Exit.UNREACHABLE
    finally:
        await results.close()
    if family.tasks[task_id] is None:
        print_error(f"{task_id}: the storage has no completed task of this id", note)
        return Exit.JOB_FAILED
    if as_json:
        sys.stdout.write(json.dumps(_as_json(task_id, family), ensure_ascii=False) + "\n")
    else:
        # A program that reads it gets a task a line; a terminal wraps the words of one within the tree.
        _print(task_id, family, Console(highlight=False, width=None if sys.stdout.isatty() else _UNWRAPPED))
    if not family.complete:
        print_warning(f"the family is larger: {MOST_TASKS:,} tasks are shown", note)
    return Exit.DONE


def _as_json(task_id: str, family: Family) -> dict[str, Any]:
    tasks = [
        {
            "task_id": each,
            "found": ending is not None,
            "finished_at": None if ending is None else ending.finished_at.isoformat(),
            "task_type": None if ending is None else ending.request.task_type,
            "prompt": None if ending is None else ending.request.prompt,
            "songs": None if ending is None else [audio.uri for audio in ending.audios],
            "parents": [] if ending is None else [parent.model_dump(mode="json") for parent in ending.parents],
        }
        for each, ending in sorted(family.tasks.items(), key=lambda item: (item[1] is not None, _time_of(item[1])))
    ]
    return {"task_id": task_id, "complete": family.complete, "tasks": tasks}


def _time_of(ending: Completed | None) -> str:
    return "" if ending is None else ending.finished_at.isoformat()


def _print(task_id: str, family: Family, console: Console) -> None:
    for first in family.first:
        tree = Tree(_line(first, None, family, marked=first == task_id), guide_style="dim")
        _grow(tree, first, task_id, family)
        console.print(tree)


def _grow(tree: Tree, parent: str, task_id: str, family: Family) -> None:
    for relation in sorted(family.children_of(parent), key=lambda each: _time_of(family.tasks[each.child])):
        marked = relation.child == task_id
        _grow(tree.add(_line(relation.child, relation, family, marked=marked)), relation.child, task_id, family)


def _line(task_id: str, relation: Relation | None, family: Family, *, marked: bool) -> str:
    """Return a task in one line, as Rich's markup."""
    ending, name = family.tasks[task_id], escape(task_id)
    name = f"[bold cyan]{name}[/] ◀" if marked else f"[cyan]{name}[/]"
    if ending is None:
        return f"{name}  [dim]deleted, or not ended[/]"
    how = ending.request.task_type if relation is None else _how(ending, relation)
    prompt = " ".join(ending.request.prompt.split())
    prompt = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}…"
    return f"{name}  {escape(how)}, {plural(len(ending.audios), 'song')}  [dim]{escape(prompt)}[/]"


def _how(ending: Completed, relation: Relation) -> str:
    """Return what was done with the parent's song."""
    by = relation.parent.field
    done = ending.request.task_type if by == "source_task_id" else by
    if by == "quality":
        done = f"quality = {ending.request.quality}"
    return f"{done} of song {relation.parent.index}"
