# SPDX-License-Identifier: Apache-2.0
"""The planner's request handler: every request is answered exactly once."""

import asyncio
from typing import Any, cast
from unittest.mock import Mock

import pytest

from acestep_consumer.config import logs
from acestep_consumer.domain.errors import PlanFailed
from acestep_consumer.domain.job import Plan
from acestep_consumer.engine.messages import Done, FromEngine, LmStats, PlanSongs, RequestFailed, SetLogLevel, Stop
from acestep_consumer.engine.planner import service as service_module
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.planning import SongPlanner
from acestep_consumer.engine.planner.service import PlannerService, report_stats
from acestep_schemas.events import ErrorCode, Metas
from tests.support.admission import admitted_job
from tests.support.waiting import eventually

PLAN = Plan(metas=Metas())


class ScriptedPlanner:
    """Returns the plan, or raises the error, once ``go`` is set."""

    def __init__(self, ends: Exception | None = None) -> None:
        self.began, self.go = asyncio.Event(), asyncio.Event()
        self._ends = ends

    async def plan(self, *_: Any) -> Plan:
        self.began.set()
        await self.go.wait()
        if self._ends:
            raise self._ends
        return PLAN


async def served(planner: ScriptedPlanner) -> tuple[PlannerService, list[FromEngine]]:
    sent: list[FromEngine] = []
    service = PlannerService(cast("SongPlanner", planner), sent.append)
    service.handle(PlanSongs(request_id=7, job=admitted_job()))
    return service, sent


@pytest.mark.parametrize(
    ("ends", "answer"),
    [
        (None, Done(request_id=7, result=PLAN)),
        (PlanFailed("no"), RequestFailed(request_id=7, code=ErrorCode.PLAN_FAILED, reason="no")),
        (
            KeyError("x"),
            RequestFailed(
                request_id=7, code=ErrorCode.PLAN_FAILED, reason="the planner failed on this request (KeyError)"
            ),
        ),
    ],
    ids=["done", "failed", "a bug"],
)
async def test_a_request_is_answered_once(ends: Exception | None, answer: FromEngine) -> None:
    planner = ScriptedPlanner(ends)
    _, sent = await served(planner)
    planner.go.set()
    await eventually(lambda: sent)
    assert sent == [answer]


@pytest.mark.parametrize("begun", [False, True], ids=["before it began", "in the middle"])
async def test_a_stopped_request_is_answered_too(begun: bool) -> None:  # noqa: FBT001 - a table of values
    planner = ScriptedPlanner()
    service, sent = await served(planner)
    if begun:
        await planner.began.wait()
    service.handle(Stop(request_id=7))
    await eventually(lambda: sent)
    service.handle(Stop(request_id=7))
    assert sent == [RequestFailed(request_id=7, code=ErrorCode.CANCELLED, reason="stopped on request")]


async def test_the_log_level_is_the_parents() -> None:
    service, before = PlannerService(cast("SongPlanner", ScriptedPlanner()), lambda _: None), logs._threshold.level
    try:
        service.handle(SetLogLevel(log_level="error"))
        assert logs._threshold.level == 40
    finally:
        logs._threshold.level = before


async def test_sequences_that_are_written_and_that_wait_are_told_where_that_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "STATS_INTERVAL_S", 0.001)
    loop, sent = Mock(running=2, waiting=0), list[FromEngine]()
    reporting = asyncio.create_task(report_stats(cast("EngineLoop", loop), sent.append))
    await eventually(lambda: sent)
    await asyncio.sleep(0.02)
    loop.waiting = 3
    await eventually(lambda: len(sent) > 1)
    reporting.cancel()
    assert sent == [LmStats(running=2, waiting=0), LmStats(running=2, waiting=3)]
