# SPDX-License-Identifier: Apache-2.0
"""The planner's request handler: each request is a task of its own, and all of them share the engine loop."""

import asyncio
from collections.abc import Callable

import structlog

from acestep_consumer.config.logs import set_log_level
from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.engine.messages import (
    Done,
    FromEngine,
    LmStats,
    PlanSongs,
    Progressed,
    RequestFailed,
    SetLogLevel,
    Stop,
    ToEngine,
)
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.planning import SongPlanner
from acestep_schemas.events import ErrorCode

Send = Callable[[FromEngine], None]

STATS_INTERVAL_S = 1.0

log = structlog.get_logger()


class PlannerService:
    """Answers requests, any number at a time."""

    def __init__(self, planner: SongPlanner, send: Send) -> None:
        self._planner = planner
        self._send = send
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def handle(self, message: ToEngine) -> None:
        """Start a request, stop one, or change the log level."""
        match message:
            case PlanSongs(request_id=request_id):
                task = self._tasks[request_id] = asyncio.create_task(
                    self._answer(message), name=f"request {request_id}"
                )
                task.add_done_callback(lambda task: self._on_done(request_id, task))
            case Stop(request_id=request_id) if request_id in self._tasks:
                self._tasks[request_id].cancel()
            case SetLogLevel(log_level=level):
                set_log_level(level)

    def _on_done(self, request_id: int, task: "asyncio.Task[None]") -> None:
        """Remove a request. A stopped one is answered here: its task may never have begun."""
        self._tasks.pop(request_id, None)
        if task.cancelled():
            self._send(RequestFailed(request_id=request_id, code=ErrorCode.CANCELLED, reason="stopped on request"))

    async def _answer(self, message: PlanSongs) -> None:
        request_id = message.request_id

        def report(fraction: float, stage: str) -> None:
            self._send(Progressed(request_id=request_id, fraction=fraction, stage=stage))

        try:
            plan = await self._planner.plan(message.job, message.source, report)
        except ConsumerError as error:
            self._send(RequestFailed.of(request_id, error))
        except Exception as error:
            log.exception("planning failed unexpectedly", task_id=message.job.task_id)
            reason = f"the planner failed on this request ({type(error).__name__})"
            self._send(RequestFailed(request_id=request_id, code=ErrorCode.PLAN_FAILED, reason=reason))
        else:
            self._send(Done(request_id=request_id, result=plan))


async def report_stats(engine_loop: EngineLoop, send: Send) -> None:
    """Send how many sequences are written and wait, once a second where that has changed, until cancelled."""
    sent: LmStats | None = None
    while True:
        await asyncio.sleep(STATS_INTERVAL_S)
        stats = LmStats(running=engine_loop.running, waiting=engine_loop.waiting)
        if stats != sent:
            sent = stats
            send(stats)
