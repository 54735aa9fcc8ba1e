# SPDX-License-Identifier: Apache-2.0
"""Terminal output: displays that update in place, and numbers with units."""

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Draw = Callable[[RenderableType], None]

BROKER: Final = "the broker (ACESTEP_AMQP_URL)"
STORAGE: Final = "the storage (ACESTEP_S3_ENDPOINT)"
_SAID_AFTER_S: Final = 1.0
_LATE_S: Final = 0.1


@contextmanager
def waiting_for(what: str, note: Console) -> "Iterator[Callable[[], None]]":
    """Print what is being waited for, if it takes longer than a second; the function says that the wait is over.

    Time in which this program itself was busy, with imports, does not count.
    """
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def wait() -> None:
        due_s = loop.time() + _SAID_AFTER_S
        timers[:] = [loop.call_at(due_s, show, due_s)]

    def show(due_s: float) -> None:
        if loop.time() > due_s + _LATE_S:
            wait()
        else:
            note.print(f"waiting for {what} …", style="dim", markup=False, soft_wrap=True)

    def end() -> None:
        timers[0].cancel()

    wait()
    try:
        yield end
    finally:
        end()


def live_display(console: Console) -> AbstractContextManager[Draw]:
    """Return a context whose function draws a frame: in place on a terminal, one below the other elsewhere."""
    return _in_place(console) if console.is_terminal else _appended(console)


@contextmanager
def _in_place(console: Console) -> "Iterator[Draw]":
    # Not on the alternate screen: the last frame stays readable after Ctrl-C. The empty line below each frame is for
    # the terminal's echo, "^C": at the end of a full line it would wrap, and the frame be redrawn one line too low.
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda frame: live.update(Group(frame, ""), refresh=True)


@contextmanager
def _appended(console: Console) -> "Iterator[Draw]":
    # A line of text stays one line, for grep.
    yield lambda frame: console.print(frame, soft_wrap=isinstance(frame, str))


def silence_client() -> None:
    """Silence the log of the AMQP libraries and of our client: the command itself reports a lost connection."""
    silence_amqp_libraries()
    logging.getLogger("acestep_consumer.client").setLevel(logging.CRITICAL)


def silence_amqp_libraries() -> None:
    """Silence the AMQP libraries' log; our client's own, about subscriptions lost and restored, stays."""
    for library in ("aiormq", "aio_pika"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def bullet_list(notes: "Iterable[str]") -> Table:
    """Return notes as a list with a hanging indent."""
    found = Table.grid(padding=(0, 1, 0, 0))
    found.add_column(width=1)
    found.add_column(overflow="fold")
    for note in notes:
        found.add_row("-", Text(note), style="yellow")
    return found


UNKNOWN: Final = "–"
_MINUTE, _HOUR = 60, 3600
_SHORTEST_ESTIMATE: Final = 10
_SHORT: Final = "a few seconds"
_STEPS: Final = ("B", "kB", "MB", "GB", "TB")
_STEP: Final = 1000


def seconds(value: float | None) -> str:
    """Format seconds as ``1.5 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if value is None:
        return UNKNOWN
    if value < _MINUTE:
        return f"{value:.1f} s" if 0 < value < 10 else f"{value:.0f} s"  # noqa: PLR2004 - two digits either way
    whole = round(value)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"


def about(value: float | None, most: float | None = None) -> str:
    """Format an estimate in seconds, or a range: ``about 40 s``, ``about 4 to 7 min``, ``unknown``."""
    if value is None:
        return "unknown"
    least, greatest = _rounded(value), _rounded(value if most is None else most)
    if least == greatest:
        return least if least == _SHORT else f"about {least}"
    if least == _SHORT:
        return f"up to {greatest}"
    number, _, unit = least.partition(" ")
    return f"about {number if unit == greatest.partition(' ')[2] else least} to {greatest}"


def _rounded(value: float) -> str:
    if value < _SHORTEST_ESTIMATE:
        return _SHORT
    if value < 2 * _MINUTE:
        return f"{_nearest(value, 5 if value < _MINUTE else 10)} s"
    if value < 2 * _HOUR:
        return f"{_nearest(value, _MINUTE) // _MINUTE} min"
    return f"{_nearest(value, _HOUR) // _HOUR} h"


def _nearest(value: float, step: int) -> int:
    return step * math.floor(value / step + 0.5)


def size(value: float | None) -> str:
    """Format bytes as ``512 B`` or ``1.5 MB``, in steps of 1000."""
    if value is None:
        return UNKNOWN
    for unit in _STEPS:
        if abs(value) < _STEP or unit == _STEPS[-1]:
            break
        value /= _STEP
    return f"{value:.0f} {unit}" if unit == _STEPS[0] else f"{value:.1f} {unit}"


def share(value: float | None) -> str:
    """Format 0 to 1 as a percentage."""
    return UNKNOWN if value is None else f"{value:.0%}"


def number(value: float | None) -> str:
    """Format a count, or a rate with at most two decimals."""
    return UNKNOWN if value is None else f"{round(value, 2):,g}" if value < 10_000 else f"{value:,.0f}"  # noqa: PLR2004 - `g` would write an exponent


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: ``1 worker``, ``2 workers``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def two_digits(value: float) -> str:
    """Format an estimate with two significant digits: ``1.2``, ``21``, ``1,100``."""
    return f"{float(f'{value:.2g}'):,.10g}"
