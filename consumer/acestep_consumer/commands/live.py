# SPDX-License-Identifier: Apache-2.0
"""A picture that changes: drawn in place on a terminal, one below the other where the output goes elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

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
