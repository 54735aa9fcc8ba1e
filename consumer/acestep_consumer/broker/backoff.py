# SPDX-License-Identifier: Apache-2.0
"""Exponential backoff with jitter."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def backoff(first_s: float, longest_s: float) -> Iterator[float]:
    """Yield waits in seconds without end: doubling up to ``longest_s``.

    Each is shortened at random by up to half, so that workers that lost the broker together do not return together.
    """
    wait = first_s
    while True:
        yield wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards no secret
        wait = min(2 * wait, longest_s)
