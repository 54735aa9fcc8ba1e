# SPDX-License-Identifier: Apache-2.0
"""Retries that begin after a first attempt has failed.

Almost always the first attempt is all, and tenacity takes as long as an attempt's own work: it is used from then on.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def failed_once(error: Exception, attempt: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
    """Return ``attempt`` as a retrier is to see it after it has failed: the first call raises that error."""
    known: list[Exception] = [error]

    async def again() -> T:
        if known:
            raise known.pop()
        return await attempt()

    return again
