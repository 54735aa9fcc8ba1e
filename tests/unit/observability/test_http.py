# SPDX-License-Identifier: Apache-2.0
"""The pages of health: alive, ready or not and why, and how the engines are."""

from typing import Any

import pytest
from aiohttp import ClientSession

from acestep_consumer.observability.http import EngineStates, HealthServer

ENGINES = {"renderer": {"ready": True, "restarts": 0}, "planner": {"ready": False, "restarts": 3}}


def yes() -> bool:
    return True


def no() -> bool:
    return False


def broken() -> bool:
    raise RuntimeError


async def page(path: str, *, engines: EngineStates = dict, **checks: Any) -> tuple[int, Any]:
    pages = HealthServer(checks, lambda _: (b"", "text/plain"), "127.0.0.1", 0, engines=engines)
    async with (
        pages,
        ClientSession() as client,
        client.get(f"http://127.0.0.1:{pages.port}{path}") as answer,
    ):
        return answer.status, await answer.json()


async def test_a_worker_is_ready_when_every_condition_holds() -> None:
    status, body = await page("/readyz", broker=yes, models=yes)
    assert (status, body["status"], body["checks"]) == (200, "ready", {"broker": True, "models": True})


@pytest.mark.parametrize("check", [no, broken])
async def test_a_condition_that_does_not_hold_or_breaks_is_named(check: Any) -> None:
    status, body = await page("/readyz", broker=yes, models=check)
    assert (status, body["status"], body["checks"]) == (503, "not ready", {"broker": True, "models": False})


async def test_readiness_tells_of_each_engine_but_does_not_hang_on_what_it_tells() -> None:
    status, body = await page("/readyz", broker=yes, engines=lambda: ENGINES)
    assert (status, body["engines"]) == (200, ENGINES)


async def test_a_worker_that_is_not_ready_is_still_alive() -> None:
    assert await page("/healthz", broker=no) == (200, {"status": "alive"})
