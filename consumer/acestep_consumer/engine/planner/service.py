# SPDX-License-Identifier: Apache-2.0
"""The planner's end of the pipe: each order is a task of its own, and all of them share the desk."""

import asyncio
from collections.abc import Callable

import structlog

from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.engine.messages import Done, FromEngine, PlanSongs, Progressed, RequestFailed, Stop, ToEngine
from acestep_consumer.engine.planner.planning import SongPlanner
from acestep_schemas.events import ErrorCode

Say = Callable[[FromEngine], None]

log = structlog.get_logger()


class PlannerService:
    """Has orders written, as many at a time as come."""

    def __init__(self, writer: SongPlanner, say: Say) -> None:
        self._writer = writer
        self._say = say
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def take(self, message: ToEngine) -> None:
        """Accept an order, or the word that nobody waits for one any more."""
        match message:
            case PlanSongs(order=number):
                task = self._tasks[number] = asyncio.create_task(self._answer(message), name=f"order {number}")
                task.add_done_callback(lambda task: self._end(number, task))
            case Stop(order=number) if number in self._tasks:
                self._tasks[number].cancel()

    def _end(self, number: int, task: "asyncio.Task[None]") -> None:
        """Forget an order. One that was stopped is answered here: it may never have begun."""
        self._tasks.pop(number, None)
        if task.cancelled():
            self._say(RequestFailed(order=number, code=ErrorCode.CANCELLED, reason="stopped on request"))

    async def _answer(self, order: PlanSongs) -> None:
        def report(fraction: float, stage: str) -> None:
            self._say(Progressed(order=order.order, fraction=fraction, stage=stage))

        try:
            plan = await self._writer.write(order.job, order.heard, report)
        except ConsumerError as error:
            self._say(RequestFailed(order=order.order, code=error.code, reason=str(error)))
        except Exception as error:
            log.exception("planning broke on a bug", task_id=order.job.task_id)
            reason = f"the planner broke on this request ({type(error).__name__})"
            self._say(RequestFailed(order=order.order, code=ErrorCode.PLAN_FAILED, reason=reason))
        else:
            self._say(Done(order=order.order, result=plan))
