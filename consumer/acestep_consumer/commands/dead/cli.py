# SPDX-License-Identifier: Apache-2.0
"""The commands and flags of ``dead``."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from acestep_consumer.commands.base import Command, Group, UsageError, load_settings, note

if TYPE_CHECKING:
    from acestep_consumer.commands.dead.run import DeadLetterFilter

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, inspect, requeue or purge dead-lettered requests.",
)

Id = Annotated[str | None, typer.Argument(metavar="ID", help="Task id or message id.")]
Everything = Annotated[bool, typer.Option("--all", help="All dead letters, or all that --code and --since select.")]
Code = Annotated[
    str | None, typer.Option("--code", metavar="CODE", help="Only those with this error code, such as render_failed.")
]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="WHEN", help="Only newer ones: 90s, 30m, 12h, 7d, or an ISO 8601 time."),
]


@app.command("list", cls=Command)
def dead_list(
    code: Code = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Show at most this many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON each.")] = False,
) -> None:
    """List dead letters, oldest first.

    On a terminal: id, error code and time, and below them the reason. Piped: one tab-separated line each, with id,
    code, time, attempts, bytes and reason.

    Nothing is removed, and the order stays. The broker marks the messages as redelivered, which has no effect.
    """
    from acestep_consumer.commands.dead import run  # noqa: PLC0415 - the other commands start faster so

    selected = _filter(None, code, since)
    raise typer.Exit(run.show_list(load_settings(), selected, note, limit=limit, as_json=as_json))


@app.command("show", cls=Command)
def dead_show(
    task_id: Annotated[str, typer.Argument(metavar="ID", help="Task id or message id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON each, not indented.")] = False,
) -> None:
    """Show a dead letter in full, as JSON.

    With the reason, properties, headers and body. Secrets are masked.
    """
    from acestep_consumer.commands.dead import run  # noqa: PLC0415 - as above

    raise typer.Exit(run.show_one(load_settings(), _filter(task_id, None, None), note, as_json=as_json))


@app.command("requeue", cls=Command)
def dead_requeue(
    task_id: Id = None,
    everything: Everything = False,
    code: Code = None,
    since: Since = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON each, as `dead list` does.")] = False,
) -> None:
    """Requeue dead letters and print their task ids.

    Body and id stay the same; the request goes to the end of the queue. A dead letter is removed only after the broker
    has confirmed the new message. When the queue is full, the rest stay where they are (exit code 3). An `expiration`
    is not set again. Subscribers will see a second terminal event for the job.
    """
    from acestep_consumer.commands.dead import run  # noqa: PLC0415 - as above

    selected = _explicit_filter(task_id, code, since, everything=everything)
    raise typer.Exit(run.requeue(load_settings(), selected, note, as_json=as_json))


@app.command("purge", cls=Command)
def dead_purge(
    task_id: Id = None,
    everything: Everything = False,
    code: Code = None,
    since: Since = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON each, as `dead list` does.")] = False,
) -> None:
    """Remove dead letters for good.

    Asks first and says how many.
    """
    from acestep_consumer.commands.dead import run  # noqa: PLC0415 - as above

    selected = _explicit_filter(task_id, code, since, everything=everything)
    raise typer.Exit(run.purge(load_settings(), selected, note, None if yes else _confirm, as_json=as_json))


def _confirm(question: str) -> bool:
    """Ask on stderr. Not with ``typer.confirm``, which takes Ctrl-C for a no."""
    note.print(f"{question} [y/N]: ", end="", markup=False)
    answer = sys.stdin.readline()
    if not answer:
        note.print("no answer; --yes skips the question")
    return answer.strip().lower() in {"y", "yes"}


def _explicit_filter(
    task_id: str | None, code: str | None, since: str | None, *, everything: bool
) -> "DeadLetterFilter":
    """Return the filter of a command that changes something: it needs an id or ``--all``."""
    if (task_id is None) is not everything:
        raise UsageError("give an id, or --all")
    return _filter(task_id, code, since)


def _filter(task_id: str | None, code: str | None, since: str | None) -> "DeadLetterFilter":
    from acestep_consumer.commands.dead.run import CODES, DeadLetterFilter, read_since  # noqa: PLC0415 - as above

    if code is not None and code not in CODES:
        raise UsageError(f"--code {code}: choose one of {', '.join(CODES)}")
    try:
        return DeadLetterFilter(task_id, code, None if since is None else read_since(since, datetime.now(UTC)))
    except ValueError as error:
        raise UsageError(f"--since {error}") from error
