# SPDX-License-Identifier: Apache-2.0
"""The execution timeout, told apart from other timeouts."""

import asyncio

import pytest

from acestep_consumer.domain.errors import ExecutionTimeout
from acestep_consumer.execution.cancel_scope import deadline


async def test_a_job_over_its_time_fails_with_the_limit_named() -> None:
    with pytest.raises(ExecutionTimeout, match=r"longer than 0\.01 seconds"):
        async with deadline(0.01):
            await asyncio.Event().wait()


async def test_a_timeout_inside_the_job_is_not_mistaken_for_it() -> None:
    with pytest.raises(TimeoutError) as caught:
        async with deadline(60):
            raise TimeoutError
    assert not isinstance(caught.value, ExecutionTimeout)


async def test_without_a_limit_nothing_is_cut() -> None:
    async with deadline(None):
        await asyncio.sleep(0)
