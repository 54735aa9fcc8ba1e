# SPDX-License-Identifier: Apache-2.0
"""The planner's end of the pipe: whatever becomes of an order, it is answered once."""

import asyncio
from typing import Any, cast

import pytest

from acestep_consumer.domain.errors import PlanFailed
from acestep_consumer.domain.job import Plan
from acestep_consumer.engine.messages import Done, FromEngine, PlanSongs, RequestFailed, Stop
from acestep_consumer.engine.planner.planning import SongPlanner
from acestep_consumer.engine.planner.service import PlannerService
from acestep_schemas.events import ErrorCode, Metas
from tests.support.admission import admitted_job
from tests.support.waiting import eventually

PLAN = Plan(metas=Metas())


class ScriptedWriter:
    """Writes what it is told to, when it is told to."""

    def __init__(self, ends: Exception | None = None) -> None:
        self.began, self.go = asyncio.Event(), asyncio.Event()
        self._ends = ends

    async def write(self, *_: Any) -> Plan:
        self.began.set()
        await self.go.wait()
        if self._ends:
            raise self._ends
        return PLAN


async def served(writer: ScriptedWriter) -> tuple[PlannerService, list[FromEngine]]:
    said: list[FromEngine] = []
    service = PlannerService(cast("SongPlanner", writer), said.append)
    service.take(PlanSongs(order=7, job=admitted_job()))
    return service, said


@pytest.mark.parametrize(
    ("ends", "answer"),
    [
        (None, Done(order=7, result=PLAN)),
        (PlanFailed("no"), RequestFailed(order=7, code=ErrorCode.PLAN_FAILED, reason="no")),
        (
            KeyError("x"),
            RequestFailed(order=7, code=ErrorCode.PLAN_FAILED, reason="the planner broke on this request (KeyError)"),
        ),
    ],
    ids=["done", "failed", "a bug"],
)
async def test_an_order_is_answered_once(ends: Exception | None, answer: FromEngine) -> None:
    writer = ScriptedWriter(ends)
    _, said = await served(writer)
    writer.go.set()
    await eventually(lambda: said)
    assert said == [answer]


@pytest.mark.parametrize("begun", [False, True], ids=["before it began", "in the middle"])
async def test_an_order_that_is_stopped_is_answered_too(begun: bool) -> None:  # noqa: FBT001 - a table of values
    writer = ScriptedWriter()
    service, said = await served(writer)
    if begun:
        await writer.began.wait()
    service.take(Stop(order=7))
    await eventually(lambda: said)
    service.take(Stop(order=7))
    assert said == [RequestFailed(order=7, code=ErrorCode.CANCELLED, reason="stopped on request")]
