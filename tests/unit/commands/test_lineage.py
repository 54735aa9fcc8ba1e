# SPDX-License-Identifier: Apache-2.0
"""What `acestep-consumer lineage` prints of a family: each task once, also where ids run in a circle."""

from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

from rich.console import Console

from acestep_consumer.commands.lineage import print_family
from acestep_consumer.storage.lineage import MOST_TASKS, Family
from acestep_schemas.events import Completed, ParentSong
from acestep_schemas.request import GenerationRequest
from tests.support.jobs import make_job, make_manifest

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)


def task(task_id: str, minutes: int, *parents: tuple[str, str], **request: Any) -> tuple[str, Completed]:
    """A completed task, so many minutes after the others began; ``parents``: each one's id and the field naming it."""
    changes = {
        "finished_at": BEGAN + timedelta(minutes=minutes),
        "parents": tuple(ParentSong(task_id=each, index=0, field=name) for each, name in parents),
        "request": GenerationRequest(**request),
    }
    return task_id, make_manifest(make_job(task_id=task_id)).model_copy(update=changes)


def printed(task_id: str, *tasks: tuple[str, Completed | None]) -> list[str]:
    out = StringIO()
    print_family(task_id, Family(dict(tasks)), Console(file=out, width=200))
    return [line.rstrip() for line in out.getvalue().replace("\xa0", " ").splitlines()]


def test_stems_have_the_words_of_their_song() -> None:
    song = task("song", 0, prompt="slow jazz")
    stems = task("parts", 1, ("song", "stems"), task_type="extract", stems=True)
    assert printed("song", song, stems) == [
        "song ◀  text2music, 0 songs  slow jazz",
        "└── parts  stems of song 0, 0 songs  slow jazz",
    ]


def test_a_task_that_is_its_own_ancestor_is_printed_once_and_said_to_be() -> None:
    first = task("a", 2, ("c", "variation"), prompt="a")
    second = task("b", 0, ("a", "variation"), prompt="b")
    third = task("c", 1, ("b", "variation"), prompt="c")
    assert printed("c", first, second, third) == [
        "b  text2music, 0 songs  b",
        "└── c ◀  variation of song 0, 0 songs  c",
        "    └── a  variation of song 0, 0 songs  a",
        "        └── b  its own ancestor: this id was used again",
    ]
    assert printed("d", task("d", 0, ("d", "stems"), prompt="d")) == [
        "d ◀  text2music, 0 songs  d",
        "└── d ◀  its own ancestor: this id was used again",
    ]


def test_a_task_whose_manifest_cannot_be_read_is_said_to_be_there() -> None:
    out = StringIO()
    made = task("made", 1, ("first", "variation"), prompt="b")
    print_family("made", Family({"first": None, **dict([made])}, {"first"}), Console(file=out, width=200))
    assert out.getvalue().splitlines()[0].rstrip() == "first  its manifest cannot be read"


def test_a_line_of_as_many_tasks_as_a_family_may_have_is_printed_to_its_end() -> None:
    rest = [task(f"t{each}", each, (f"t{each - 1}", "stems")) for each in range(1, MOST_TASKS)]
    lines = printed("t0", task("t0", 0, prompt="a"), *rest)
    assert len(lines) == MOST_TASKS
    assert lines[-1].strip() == "└── t999  stems of song 0, 0 songs  a"


def test_a_task_with_two_parents_is_below_both_and_described_once() -> None:
    family = [
        task("a", 0, prompt="a"),
        task("b", 1, ("a", "variation"), prompt="b"),
        task("c", 2, ("a", "source_task_id"), ("b", "variation"), prompt="c"),
        task("d", 3, ("c", "variation"), prompt="d"),
    ]
    assert printed("a", *family) == [
        "a ◀  text2music, 0 songs  a",
        "├── b  variation of song 0, 0 songs  b",
        "│   └── c  variation of song 0, 0 songs  c",
        "│       └── d  variation of song 0, 0 songs  d",
        "└── c  see above",
    ]
