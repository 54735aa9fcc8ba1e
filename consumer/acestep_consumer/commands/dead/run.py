# SPDX-License-Identifier: Apache-2.0
"""``dead``: look through the dead letters, give them another chance, or remove them."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console

from acestep_consumer.broker.dead_letter_queue import DeadLetter, DeadLetterQueue
from acestep_consumer.broker.errors import BrokerError, Nacked, Unroutable, describe
from acestep_consumer.commands.dead import view
from acestep_consumer.commands.dead.view import DeadLetterRow
from acestep_consumer.commands.terminal import hush_libraries
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import BrokerSettings, Settings
from acestep_schemas.events import ErrorCode

# Of the broker's own verdicts, those that no error code is named for.
_BROKERS_CODES = ("rejected", "maxlen", "delivery_limit", "unknown")
CODES = (*(str(code) for code in ErrorCode), *_BROKERS_CODES)
_SPAN = re.compile(r"(\d{1,6})\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Which dead letters are meant: those that fit everything that is given."""

    id: str | None = None
    code: str | None = None
    since: datetime | None = None

    def fits(self, row: DeadLetterRow) -> bool:
        """Whether it is meant. A letter that nobody dated is older than any ``since``."""
        return (
            (self.id is None or self.id in {row.task_id, row.message_id})
            and (self.code is None or self.code == row.code)
            and (self.since is None or (row.at is not None and row.at >= self.since))
        )


def read_since(text: str, now: datetime) -> datetime:
    """Read ``90s``, ``30m``, ``12h``, ``7d`` (so long before ``now``) or an ISO 8601 time (without zone: local).

    Raises:
        ValueError: it is neither.
    """
    if span := _SPAN.fullmatch(text.strip()):
        return now - timedelta(seconds=int(span[1]) * _SECONDS[span[2]])
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text}: give a span such as 90s, 30m, 12h, 7d, or a time such as 2026-03-01T12:00") from None


def show_list(settings: Settings, choice: DeadLetterFilter, note: Console, *, limit: int, as_json: bool) -> Exit:
    """Print a line for each letter, oldest first, ``limit`` at most."""
    return _answer(_list(settings.broker, choice, note, limit, as_json=as_json), note)


def show_one(settings: Settings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    """Print every letter of one task in full: indented, or with ``as_json`` a line each."""
    return _answer(_show(settings.broker, choice, note, as_json=as_json), note)


def requeue(settings: Settings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    """Publish the letters to the requests again, each removed after its confirm; prints the task ids, or lines."""
    return _answer(_requeue(settings.broker, choice, note, as_json=as_json), note)


def purge(
    settings: Settings, choice: DeadLetterFilter, note: Console, agree: Callable[[str], bool] | None, *, as_json: bool
) -> Exit:
    """Remove the letters for good, after ``agree`` said yes to the question; without it, at once."""
    if agree is not None:
        counted = _RequeueCounts()
        code = _answer(_count(settings.broker, choice, note, counted), note)
        if code is not Exit.DONE or not counted.fitting:
            return code
        if not agree(f"Remove {_letters(counted.fitting)} for good?"):
            note.print("nothing was removed")
            return Exit.USAGE
        # Newer ones stand behind those that were counted: they were not asked about.
        return _answer(_purge(settings.broker, choice, note, counted.seen, as_json=as_json), note)
    return _answer(_purge(settings.broker, choice, note, None, as_json=as_json), note)


@dataclass(slots=True)
class _RequeueCounts:
    seen: int = 0
    fitting: int = 0


def _answer(work: Coroutine[Any, Any, Exit], note: Console) -> Exit:
    """Run it; a fault of the broker becomes its text and the exit code."""
    hush_libraries()
    try:
        return asyncio.run(work)
    except BrokerError as fault:
        note.print(describe(fault), style="red", markup=False, soft_wrap=True)
        return Exit.UNREACHABLE


async def _list(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, limit: int, *, as_json: bool) -> Exit:
    rows, shown, more = view.table(), 0, False
    async with DeadLetterQueue(broker) as queue, aclosing(_fitting(queue, choice)) as fitting:
        async for _, row in fitting:
            if more := shown == limit:
                break
            shown += 1
            if as_json:
                _name(row, as_json=True)
            else:
                view.add(rows, row)
        count = queue.count
    if shown and not as_json:
        view.console().print(rows)
    hint = "; --limit shows more" if more else ""
    note.print(f"{_letters(shown)} shown, {count:,} in the queue{hint}", style="dim")
    return Exit.DONE


async def _show(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    found = 0
    async with DeadLetterQueue(broker) as queue, aclosing(_fitting(queue, choice)) as fitting:
        async for letter, _ in fitting:
            found += 1
            whole = view.in_full(letter)
            sys.stdout.write((json.dumps(whole) if as_json else view.as_text(whole)) + "\n")
    return Exit.DONE if found else _none(choice, note)


async def _requeue(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, *, as_json: bool) -> Exit:
    done = 0
    async with DeadLetterQueue(broker) as queue, aclosing(_fitting(queue, choice)) as fitting:
        async for letter, row in fitting:
            try:
                await queue.requeue(letter)
            except Nacked:
                note.print(
                    f"the queue is full: {_letters(done)} requeued, the others stay; try again later", style="red"
                )
                return Exit.QUEUE_FULL
            except Unroutable:
                note.print("no queue takes requests yet: run `acestep-consumer topology --declare`", style="red")
                return Exit.UNREACHABLE
            except BrokerError:
                note.print(
                    f"{_letters(done)} requeued; the next one stays, and may have been requeued too", style="red"
                )
                raise
            done += 1
            _name(row, as_json=as_json)
    note.print(f"{_letters(done)} requeued", style="green")
    return Exit.DONE if done else _none(choice, note)


async def _count(broker: BrokerSettings, choice: DeadLetterFilter, note: Console, tally: _RequeueCounts) -> Exit:
    async with DeadLetterQueue(broker) as queue, aclosing(_fitting(queue, choice)) as fitting:
        async for _ in fitting:
            tally.fitting += 1
        tally.seen = queue.count
    return Exit.DONE if tally.fitting else _none(choice, note)


async def _purge(
    broker: BrokerSettings, choice: DeadLetterFilter, note: Console, first: int | None, *, as_json: bool
) -> Exit:
    done = 0
    async with DeadLetterQueue(broker, at_most=first) as queue, aclosing(_fitting(queue, choice)) as fitting:
        async for letter, row in fitting:
            await queue.remove(letter)
            done += 1
            if as_json:
                _name(row, as_json=True)
    note.print(f"{_letters(done)} removed", style="green")
    return Exit.DONE if done else _none(choice, note)


async def _fitting(
    queue: DeadLetterQueue, choice: DeadLetterFilter
) -> AsyncGenerator[tuple[DeadLetter, DeadLetterRow]]:
    async with aclosing(queue.messages()) as letters:
        async for letter in letters:
            row = DeadLetterRow.of(letter)
            if choice.fits(row):
                yield letter, row


def _name(row: DeadLetterRow, *, as_json: bool) -> None:
    """Print what was done with: its id, or its line of ``dead list --json``."""
    text = json.dumps(row.as_json()) if as_json else view.printable(row.task_id or row.message_id or "–")
    sys.stdout.write(text + "\n")


def _none(choice: DeadLetterFilter, note: Console) -> Exit:
    """Nothing fits: a mistake when one was named, and nothing to do otherwise."""
    if choice.id is None:
        note.print("no dead letter fits")
        return Exit.DONE
    note.print(f"no dead letter has the id {choice.id}: see `acestep-consumer dead list`", style="red", markup=False)
    return Exit.USAGE


def _letters(count: int) -> str:
    return "1 dead letter" if count == 1 else f"{count:,} dead letters"
