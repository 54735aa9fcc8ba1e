# SPDX-License-Identifier: Apache-2.0
"""A picture that changes: drawn in place on a terminal, one below the other where the output goes elsewhere."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console, RenderableType
from rich.live import Live

if TYPE_CHECKING:
    from collections.abc import Iterator

Draw = Callable[[RenderableType], None]


def drawing(console: Console) -> AbstractContextManager[Draw]:
    """Return a context in which each picture replaces the one before, if ``console`` is a terminal."""
    return _in_place(console) if console.is_terminal else _one_below_the_other(console)


@contextmanager
def _in_place(console: Console) -> "Iterator[Draw]":
    # Not on the alternate screen: what was seen last stays to be read after Ctrl-C.
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda picture: live.update(picture, refresh=True)


@contextmanager
def _one_below_the_other(console: Console) -> "Iterator[Draw]":
    # A line of text stays one line: somebody may search for it.
    yield lambda picture: console.print(picture, soft_wrap=isinstance(picture, str))


def hush() -> None:
    """Let the broker's client libraries say nothing on stderr."""
    hush_libraries()
    logging.getLogger("acestep_consumer.client").setLevel(logging.CRITICAL)


def hush_libraries() -> None:
    """Silence the AMQP libraries alone: that a subscription was lost and is made again is said by our own client."""
    for library in ("aiormq", "aio_pika"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


UNKNOWN: Final = "–"
_MINUTE, _HOUR = 60, 3600
_STEPS: Final = ("B", "kB", "MB", "GB", "TB")
_STEP: Final = 1000


def seconds(value: float | None) -> str:
    """Write seconds as ``1.5 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if value is None:
        return UNKNOWN
    if value < _MINUTE:
        return f"{value:.1f} s" if 0 < value < 10 else f"{value:.0f} s"  # noqa: PLR2004 - two digits either way
    whole = round(value)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"


def size(value: float | None) -> str:
    """Write bytes as ``512 B`` or ``1.5 MB``, in steps of a thousand."""
    if value is None:
        return UNKNOWN
    for unit in _STEPS:
        if abs(value) < _STEP or unit == _STEPS[-1]:
            break
        value /= _STEP
    return f"{value:.0f} {unit}" if unit == _STEPS[0] else f"{value:.1f} {unit}"


def share(value: float | None) -> str:
    """Write 0 to 1 as a percentage."""
    return UNKNOWN if value is None else f"{value:.0%}"


def number(value: float | None) -> str:
    """Write a count, or a rate with at most two digits behind the point."""
    return UNKNOWN if value is None else f"{round(value, 2):,g}" if value < 10_000 else f"{value:,.0f}"  # noqa: PLR2004 - `g` would write an exponent
