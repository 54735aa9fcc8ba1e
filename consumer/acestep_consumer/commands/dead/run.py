# SPDX-License-Identifier: Apache-2.0
"""Lists, shows, requeues and purges the messages of the dead-letter queue."""

import json
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console

from acestep_consumer.broker.dead_letter_queue import DeadLetter, DeadLetterQueue
from acestep_consumer.broker.errors import BrokerError, Nacked, Unroutable, describe
from acestep_consumer.commands.base import print_error, run_to_end
from acestep_consumer.commands.dead import view
from acestep_consumer.commands.dead.view import DeadLetterRow
from acestep_consumer.commands.terminal import BROKER, plural, silence_amqp_libraries, waiting_for
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import BrokerSettings, Settings
from acestep_schemas.events import ErrorCode

# The broker's own reasons that are not error codes.
_BROKERS_CODES = ("rejected", "maxlen", "delivery_limit", "unknown")
CODES = (*(str(code) for code in ErrorCode), *_BROKERS_CODES)
_SPAN = re.compile(r"(\d{1,6})\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Selects dead letters: those that match every field that is not None."""

    id: str | None = None
    code: str | None = None
    since: datetime | None = None

    def matches(self, row: DeadLetterRow) -> bool:
        """Whether the filter selects this dead letter. One without a time is older than any ``since``."""
        return (
            (self.id is None or self.id in {row.task_id, row.message_id})
            and (self.code is None or self.code == row.code)
            and (self.since is None or (row.at is not None and row.at >= self.since))
        )


def read_since(text: str, now: datetime) -> datetime:
    """Parse ``90s``, ``30m``, ``12h``, ``7d`` (before ``now``) or an ISO 8601 time (local unless it has a zone).

    Raises:
        ValueError: it is neither.
    """
    if span := _SPAN.fullmatch(text.strip()):
        return now - timedelta(seconds=int(span[1]) * _SECONDS[span[2]])
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text}: give a duration such as 90s, 30m, 12h or 7d, or a time such as 2026-03-01T12:00"
        ) from None


def show_list(settings: Settings, choice: DeadLetterFilter, note: Console, *, limit: int, as_json: bool) -> Exit:
    """Print the dead letters, oldest first, at most ``limit``."""
    return _run(_list(settings.broker, choice, note, limit, as_json=as_json), note)


def show_one(settings: Settings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    """Print every dead letter of one task in full: indented, or with ``as_json`` one line each."""
    return _run(_show(settings.broker, choice, note, as_json=as_json), note)


def requeue(settings: Settings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    """Publish dead letters as requests again, each removed after its confirm; prints task ids or lines of JSON."""
    return _run(_requeue(settings.broker, choice, note, as_json=as_json), note)


def purge(
    settings: Settings, choice: DeadLetterFilter, note: Console, confirm: Callable[[str], bool] | None, *, as_json: bool
) -> Exit:
    """Remove dead letters for good, after ``confirm`` answered yes; None: at once."""
    if confirm is not None:
        counted = _Counts()
        code = _run(_count(settings.broker, choice, note, counted), note)
        if code is not Exit.DONE or not counted.matching:
            return code
        if not confirm(f"Remove {_dead_letters(counted.matching)} for good?"):
            note.print("nothing was removed")
            return Exit.USAGE
        # Newer ones are behind those that were counted, and the question was not about them.
        return _run(_purge(settings.broker, choice, note, counted.seen, as_json=as_json), note)
    return _run(_purge(settings.broker, choice, note, None, as_json=as_json), note)


@dataclass(slots=True)
class _Counts:
    seen: int = 0
    matching: int = 0


def _run(command: Coroutine[Any, Any, Exit], note: Console) -> Exit:
    """Run a coroutine; prints an error of the broker and returns the exit code."""
    silence_amqp_libraries()
    try:
        return run_to_end(command)
    except BrokerError as error:
        print_error(describe(error), note)
        return Exit.UNREACHABLE


async def _list(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, limit: int, *, as_json: bool) -> Exit:
    out, shown, more = Console(highlight=False), 0, False
    async with _matching(broker, choice, note) as (queue, matching):
        async for _, row in matching:
            if more := shown == limit:
                break
            shown += 1
            if as_json:
                _print_done(row, as_json=True)
            else:
                view.print_row(row, out)
        count = queue.count
    hint = "; --limit shows more" if more else ""
    note.print(f"{_dead_letters(shown)} shown, {count:,} in the queue{hint}", style="dim")
    return Exit.DONE


async def _show(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    found = 0
    async with _matching(broker, choice, note) as (_, matching):
        async for message, _ in matching:
            found += 1
            whole = view.in_full(message)
            sys.stdout.write((json.dumps(whole) if as_json else view.as_text(whole)) + "\n")
    return Exit.DONE if found else _none(choice, note)


async def _requeue(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    done = 0
    async with _matching(broker, choice, note) as (queue, matching):
        async for message, row in matching:
            try:
                await queue.requeue(message)
            except Nacked:
                print_error(
                    f"the queue is full: {_dead_letters(done)} requeued, the others stay; try again later", note
                )
                return Exit.QUEUE_FULL
            except Unroutable:
                print_error("there is no request queue yet: run `acestep-consumer topology --declare`", note)
                return Exit.UNREACHABLE
            except BrokerError:
                print_error(f"{_dead_letters(done)} requeued; the next one may have been, and stays here as well", note)
                raise
            done += 1
            _print_done(row, as_json=as_json)
    note.print(f"{_dead_letters(done)} requeued", style="green")
    return Exit.DONE if done else _none(choice, note)


async def _count(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, counted: _Counts) -> Exit:
    async with _matching(broker, choice, note) as (queue, matching):
        async for _ in matching:
            counted.matching += 1
        counted.seen = queue.count
    return Exit.DONE if counted.matching else _none(choice, note)


async def _purge(
    broker: BrokerSettings, choice: DeadLetterFilter, note: Console, first: int | None, *, as_json: bool
) -> Exit:
    done = 0
    async with _matching(broker, choice, note, at_most=first) as (queue, matching):
        async for message, row in matching:
            await queue.remove(message)
            done += 1
            if as_json:
                _print_done(row, as_json=True)
    note.print(f"{_dead_letters(done)} removed", style="green")
    return Exit.DONE if done else _none(choice, note)


@asynccontextmanager
async def _matching(
    broker: BrokerSettings, choice: DeadLetterFilter, note: Console, at_most: int | None = None
) -> AsyncIterator[tuple[DeadLetterQueue, AsyncIterator[tuple[DeadLetter, DeadLetterRow]]]]:
    """Open the queue, and iterate over the dead letters in it that the filter selects."""
    with waiting_for(BROKER, note) as connected:
        async with DeadLetterQueue(broker, at_most=at_most) as queue, aclosing(_select(queue, choice)) as matching:
            connected()
            yield queue, matching


async def _select(queue: DeadLetterQueue, choice: DeadLetterFilter) -> AsyncGenerator[tuple[DeadLetter, DeadLetterRow]]:
    async with aclosing(queue.messages()) as letters:
        async for message in letters:
            row = DeadLetterRow.of(message)
            if choice.matches(row):
                yield message, row


def _print_done(row: DeadLetterRow, *, as_json: bool) -> None:
    """Print a dead letter that was processed: its id, or its line of ``dead list --json``."""
    text = json.dumps(row.as_json()) if as_json else view.printable(row.task_id or row.message_id or "–")
    sys.stdout.write(text + "\n")


def _none(choice: DeadLetterFilter, note: Console) -> Exit:
    """Report that nothing matched, which is an error if one was named."""
    if choice.id is None:
        note.print("no dead letter matches", style="dim")
        return Exit.DONE
    print_error(f"no dead letter has the id {choice.id}; `acestep-consumer dead list` shows all", note)
    return Exit.USAGE


def _dead_letters(count: int) -> str:
    return plural(count, "dead letter")
