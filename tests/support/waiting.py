# SPDX-License-Identifier: Apache-2.0
"""Waiting for something to become true, with a deadline."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

WITHIN_S: Final = 240.0
"""Seconds that a test waits for an event that must come: enough for a slow and busy machine, free where it comes."""


async def eventually(condition: Callable[[], object], within_s: float = WITHIN_S) -> None:
    """Poll ``condition`` until it holds. Raises ``AssertionError`` after ``within_s`` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} seconds"
        await asyncio.sleep(0.02)
