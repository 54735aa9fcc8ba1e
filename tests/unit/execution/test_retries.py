# SPDX-License-Identifier: Apache-2.0
"""Attempts of other workers: one that is renewed is waited for, one that is silent is given up."""

from collections.abc import Callable, Sequence

import pytest

from acestep_consumer.execution import retries
from acestep_consumer.execution.retries import SILENT_LOOKS, RetryPolicy
from tests.support.fakes import FakeAttempts

Looks = Sequence[tuple[bytes, ...]]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LOOK_S", 0)


async def looked(looks: Looks, ended: Callable[[int], bool] = lambda _: False) -> tuple[bool, int]:
    """Return whether anybody may have had the message, and how often it was asked whether it has ended."""
    asked = 0

    async def ask() -> bool:
        nonlocal asked
        asked += 1
        return ended(asked)

    policy = RetryPolicy(FakeAttempts(others=list(looks)), most=3)
    return await policy.others_over("song", "m1", delivered=False, ended=ask), asked


async def test_a_message_that_nobody_had_is_not_waited_for() -> None:
    assert await looked([()]) == (False, 0)


async def test_an_attempt_that_is_renewed_is_waited_for_however_long_it_takes() -> None:
    renewals = [(b"%d" % count,) for count in range(5 * SILENT_LOOKS)]
    assert await looked([*renewals, ()]) == (True, len(renewals))


async def test_an_attempt_that_is_not_renewed_is_given_up() -> None:
    assert await looked([(b"1",)]) == (True, SILENT_LOOKS)
    assert await looked([(b"1",)] * 9 + [(b"2",)]) == (True, 9 + SILENT_LOOKS)


async def test_a_message_that_has_ended_is_not_waited_for_any_longer() -> None:
    assert await looked([(b"1",)], ended=lambda asked: asked == 3) == (True, 3)
