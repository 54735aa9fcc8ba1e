# SPDX-License-Identifier: Apache-2.0
"""The execution timeout: a bound on one job's run that ends as one of our errors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from consumer.errors import ExecutionTimeout


@asynccontextmanager
async def deadline(seconds: float | None) -> AsyncIterator[None]:
    """Cancel the body after ``seconds`` (None: never) and raise ``ExecutionTimeout``."""
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise  # somebody else's timeout, inside the body
        raise ExecutionTimeout(f"the job ran longer than {seconds:g} seconds") from error
