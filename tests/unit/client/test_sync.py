# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a call of the client without ``async`` waits, at any moment of it."""

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from acestep_consumer.client import sync
from tests.support.waiting import WITHIN_S


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join(WITHIN_S)
    assert not thread.is_alive()
    made.close()


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line or call that a thread executes, as Ctrl-C may."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, frame: FrameType, event: str, _: object) -> "InterruptAt | None":
        if frame.f_code.co_filename not in {sync.__file__, threading.__file__, concurrent.futures._base.__file__}:
            return None
        self.left -= event != "exception"
        if self.left == 0:
            raise KeyboardInterrupt
        return self


def test_ctrl_c_at_no_moment_of_a_call_stops_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Else whoever presses it has to kill the program: closing the client waits for the loop."""
    for number in range(1, 200):
        interrupt: Any = InterruptAt(number)
        before = sys.gettrace()
        work = asyncio.sleep(0.005, "done")
        sys.settrace(interrupt)
        try:
            found = sync._result_of(work, loop)
        except KeyboardInterrupt:
            found = None
        finally:
            sys.settrace(before)
        alive = threading.Event()
        loop.call_soon_threadsafe(loop.call_later, 0.01, alive.set)
        assert alive.wait(WITHIN_S), number
        if found is not None:  # it ended before that moment
            assert found == "done"
            return
        work.close()
    pytest.fail("no call got through")


def test_a_call_returns_its_result_and_raises_its_error(loop: asyncio.AbstractEventLoop) -> None:
    async def fail() -> None:
        raise ValueError("no")

    assert sync._result_of(asyncio.sleep(0, 3), loop) == 3
    with pytest.raises(ValueError, match="no"):
        sync._result_of(fail(), loop)
