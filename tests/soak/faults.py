# SPDX-License-Identifier: Apache-2.0
"""The plan carried out, each fault at its time and for its time; afterwards all is whole again."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tests.soak.plan import Fault, Kind
from tests.support.faulty_s3 import s3_error

if TYPE_CHECKING:
    from aiohttp import web

    from tests.soak.servers import SoakServers
    from tests.soak.worker_slot import WorkerSlot

Tell = Callable[[str], None]


class FaultInjector:
    """Breaks things on ``soak_servers``. ``tell`` gets a line for each."""

    def __init__(self, soak_servers: SoakServers, tell: Tell) -> None:
        self._soak_servers = soak_servers
        self._tell = tell
        self.done: Counter[Kind] = Counter()
        self.now: set[Fault] = set()
        # On a busy machine a broker takes longer to come back than the next fault takes to come.
        self._broker_turn = asyncio.Lock()

    async def carry_out(self, plan: Sequence[Fault]) -> None:
        """Do all of it; return when the last fault is over."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in plan:
                await asyncio.sleep(began + fault.at_s - time.monotonic())
                group.create_task(self._do(fault))

    async def _do(self, fault: Fault) -> None:
        self._tell(str(fault))
        self.now.add(fault)
        try:
            if await self._break(fault):
                self.done[fault.kind] += 1
        finally:
            self.now.discard(fault)

    async def _break(self, fault: Fault) -> bool:
        """Do one fault and make it good again. False when there was nothing to break."""
        match fault.kind.target:
            case "broker":
                async with self._broker_turn:
                    return await self._break_broker(fault)
            case "worker" | "engine":
                return await _break_worker(fault, self._slot(fault))
            case "amqp":
                return await _break_amqp(fault, self._slot(fault))
            case _:
                return await _break_s3(fault, self._slot(fault))

    def _slot(self, fault: Fault) -> WorkerSlot:
        assert fault.slot is not None
        return self._soak_servers.slots[fault.slot]

    async def _break_broker(self, fault: Fault) -> bool:
        broker = self._soak_servers.broker
        if fault.kind is Kind.CONNECTIONS_CLOSED:
            await asyncio.to_thread(self._soak_servers.close_connections)
            return True
        await asyncio.to_thread(broker.kill if fault.kind is Kind.BROKER_KILLED else broker.stop)
        await asyncio.sleep(fault.lasts_s)
        await asyncio.to_thread(broker.start)
        return True


async def _break_worker(fault: Fault, slot: WorkerSlot) -> bool:
    if fault.kind is Kind.ENGINE_KILLED:
        return slot.kill_engine()
    slot.rest()
    hit = slot.signal(signal.SIGKILL if fault.kind is Kind.WORKER_KILLED else signal.SIGTERM)
    await asyncio.sleep(fault.lasts_s)
    if fault.kind is Kind.WORKER_HURRIED:
        slot.signal(signal.SIGTERM)
    slot.wake()
    return hit


async def _break_amqp(fault: Fault, slot: WorkerSlot) -> bool:
    wire = slot.amqp
    match fault.kind:
        case Kind.AMQP_CUT:
            return wire.cut() > 0
        case Kind.AMQP_CUT_WITHIN:
            wire.drop_after(round(2_000 * fault.dose))
        case Kind.AMQP_STALLED:
            wire.stall()
        case Kind.AMQP_HALF_OPEN:
            wire.abandon()
        case Kind.AMQP_SLOW:
            wire.slow(2_000 + 20_000 * fault.dose)
        case _:
            wire.refuse()
    await asyncio.sleep(fault.lasts_s)
    wire.heal()
    return True


async def _break_s3(fault: Fault, slot: WorkerSlot) -> bool:
    wire = slot.wire
    with ExitStack() as healing:
        match fault.kind:
            case Kind.S3_CUT:
                return wire.cut() > 0
            case Kind.S3_CUT_WITHIN:
                wire.drop_after(round(40_000 * fault.dose))
            case Kind.S3_HANGS:
                wire.stall()
            case Kind.S3_SLOW:
                wire.slow(20_000 + 200_000 * fault.dose)
            case Kind.S3_ERRORS:
                healing.enter_context(slot.front.fault(_some_503s(fault)))
            case Kind.S3_ANSWERS_LATE:
                healing.enter_context(slot.front.hold(_is_upload, answered=True))
            case Kind.S3_ANSWERS_LOST:
                healing.enter_context(_answers_lost(fault, slot))
            case _:
                wire.refuse()
        await asyncio.sleep(fault.lasts_s)
    wire.heal()
    return True


def _is_upload(request: web.Request) -> bool:
    """Whether it stores a song: with its answer held, the job's cancellation leaves an object without a manifest."""
    return request.method == "PUT" and request.path.rpartition("/")[2].startswith("0")


def _some_503s(fault: Fault) -> Callable[[web.Request], web.Response | None]:
    """Between a third and all of the requests, one after the other drawn from the fault's own chance."""
    chance = random.Random(fault.dose)  # noqa: S311 - no secret
    share = 1 / 3 + fault.dose

    def answer(_: web.Request) -> web.Response | None:
        return s3_error(503, "SlowDown") if chance.random() < share else None

    return answer


@contextmanager
def _answers_lost(fault: Fault, slot: WorkerSlot) -> Iterator[None]:
    """Requests are carried out, and some answers never come: was it written or not?"""
    chance = random.Random(fault.dose)  # noqa: S311 - no secret
    slot.front.lose_answers(lambda request: request.method in ("PUT", "POST") and chance.random() < 1 / 2)
    try:
        yield
    finally:
        slot.front.lose_answers(lambda _: False)
