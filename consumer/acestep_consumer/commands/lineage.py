# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer lineage`: prints what a song was made from, and what was made from it."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.commands.base import print_error, print_warning
from acestep_consumer.commands.terminal import STORAGE, plural, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_consumer.storage.lineage import MOST_TASKS, Family, Relation, time_of
from acestep_schemas.events import Completed

_RETRY_S: Final = 10.0
_SHOWN: Final = 60
_UNWRAPPED: Final = 10_000
_INDENT: Final = 4
_NARROWEST: Final = 40
"""Columns for a task beside its indentation."""


async def lineage(settings: Settings, task_id: str, note: Console, *, as_json: bool) -> Exit:
    """Print the family of a task: ``JOB_FAILED`` where the storage has no such task."""
    results = Results(settings.storage, retry_s=_RETRY_S)
    try:
        with waiting_for(STORAGE, note):
            family = await results.family(task_id)
    except DownloadFailed as error:
        print_error(str(error), note)
        return Exit.UNREACHABLE
    finally:
        await results.close()
    if family.tasks[task_id] is None:
        print_error(f"{task_id}: the storage has no completed task of this id", note)
        return Exit.JOB_FAILED
    if as_json:
        sys.stdout.write(json.dumps(family.listed(task_id, lambda _, audio: audio.uri), ensure_ascii=False) + "\n")
    else:
        # A program that reads it gets a task a line; a terminal wraps the words of one within the tree.
        print_family(task_id, family, Console(highlight=False, width=None if sys.stdout.isatty() else _UNWRAPPED))
    if not family.complete:
        print_warning(f"the family is larger: {MOST_TASKS:,} tasks are shown", note)
    return Exit.DONE


def print_family(task_id: str, family: Family, console: Console) -> None:
    """Print the family as trees, the task that was asked for marked."""
    printer = _TreePrinter(task_id, family)
    trees = [printer.tree(first) for first in family.first]
    # What is left are circles: they have no first task, and begin with the oldest one.
    while rest := sorted(set(family.tasks) - printer.printed, key=lambda each: time_of(family.tasks[each])):
        trees.append(printer.tree(rest[0]))
    # Rich leaves out what is indented beyond the width: a terminal that is narrower wraps the lines itself.
    console.width = max(console.width, _INDENT * printer.depth + _NARROWEST)
    for tree in trees:
        console.print(tree)


class _TreePrinter:
    """Builds trees of a family in which each task is described once. ``marked`` is the task that was asked for."""

    def __init__(self, marked: str, family: Family) -> None:
        self.printed: set[str] = set()
        self.depth = 0
        self._marked = marked
        self._family = family

    def tree(self, first: str) -> Tree:
        """Return a task and those that come from it."""
        tree = Tree(self._line(first, None, ""), guide_style="dim")
        # A stack, because songs can be extended more often than Python calls may be nested.
        branches: list[tuple[Tree, tuple[str, ...], str, Iterator[Relation]]] = [
            (tree, (first,), self._words(first, ""), self._below(first))
        ]
        while branches:
            self.depth = max(self.depth, len(branches))
            branch, line, words, relations = branches[-1]
            if (relation := next(relations, None)) is None:
                branches.pop()
            elif relation.child in line:
                branch.add(f"{self._name(relation.child)}  [dim]its own ancestor: this id was used again[/]")
            elif relation.child in self.printed:
                branch.add(f"{self._name(relation.child)}  [dim]see above[/]")
            else:
                child = relation.child
                grown = branch.add(self._line(child, relation, words))
                branches.append((grown, (*line, child), self._words(child, words), self._below(child)))
        return tree

    def _below(self, parent: str) -> Iterator[Relation]:
        """Return the relations to those that come from a task, oldest first, and count it as printed."""
        self.printed.add(parent)
        return iter(sorted(self._family.children_of(parent), key=lambda each: time_of(self._tasks[each.child])))

    @property
    def _tasks(self) -> Mapping[str, Completed | None]:
        return self._family.tasks

    def _name(self, task_id: str) -> str:
        name = escape(task_id)
        return f"[bold cyan]{name}[/] ◀" if task_id == self._marked else f"[cyan]{name}[/]"

    def _words(self, task_id: str, of_parent: str) -> str:
        """Return the prompt in one line. A task without one, as stems are, has the words of its parent."""
        ending = self._tasks[task_id]
        return (ending and " ".join(ending.request.prompt.split())) or of_parent

    def _line(self, task_id: str, relation: Relation | None, of_parent: str) -> str:
        """Return a task in one line, as Rich's markup."""
        ending = self._tasks[task_id]
        if ending is None:
            why = "its manifest cannot be read" if task_id in self._family.unreadable else "deleted, or not ended"
            return f"{self._name(task_id)}  [dim]{why}[/]"
        how = ending.request.task_type if relation is None else _how(ending, relation)
        words = self._words(task_id, of_parent)
        words = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}…"
        return f"{self._name(task_id)}  {escape(how)}, {plural(len(ending.audios), 'song')}  [dim]{escape(words)}[/]"


def _how(ending: Completed, relation: Relation) -> str:
    """Return what was done with the parent's song."""
    by = relation.parent.field
    done = ending.request.task_type if by == "source_task_id" else by
    if by == "quality":
        done = f"quality = {ending.request.quality}"
    return f"{done} of song {relation.parent.index}"
