# SPDX-License-Identifier: Apache-2.0
"""``status``: the queue and its workers, once or live.

Three witnesses. AMQP tells how many messages wait. Events tell how jobs end, and what workers say of themselves when
they are asked, for as long as somebody listens. The management API, where ``ACESTEP_MANAGEMENT_URL`` is set, tells what
is in hand, whose prefetch is what, and rates.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from acestep_consumer.broker.errors import BrokerError, BrokerRefused, describe
from acestep_consumer.broker.inspection import BrokerInspection
from acestep_consumer.broker.management import ManagementClient, RequestQueue
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, UNROUTED, tier_queue
from acestep_consumer.client import Client, ClientError
from acestep_consumer.commands.status.report import ASK_EVERY_S, ObservedEvents, StatusInputs, StatusReport, status_of
from acestep_consumer.commands.status.table import picture
from acestep_consumer.commands.terminal import drawing, hush
from acestep_consumer.commands.tier_names import tier_names
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import BrokerSettings, Settings
from acestep_consumer.policy.tiers import TierTableError
from acestep_schemas.events import JobEvent, WorkerEvent

_NAME: Final = "acestep-consumer status"
_UNMONITORED: Final = (
    "without ACESTEP_MANAGEMENT_URL, workers and what they have in hand are known only from those that answer while "
    "this listens"
)
_UNDECLARED: Final = f"there is no {GENERATE} yet: start a worker, or run acestep-consumer topology --declare"


@dataclass(frozen=True, slots=True)
class StatusOptions:
    """What the flags say. ``sample_s``: how long to listen before the first answer; ``every_s``: between two."""

    watch: bool
    sample_s: float
    every_s: float
    as_json: bool


async def status(settings: Settings, order: StatusOptions, note: Console) -> Exit:
    """Print the status, once or until Ctrl-C."""
    hush()
    try:
        async with _looking(settings.broker, tier_names(settings)) as look:
            if order.sample_s and not order.as_json:
                note.print(f"listening to events for {order.sample_s:g} s …", style="dim")
            await asyncio.sleep(order.sample_s)
            await (_watch(look, order, note) if order.watch else _once(look, order))
    except TierTableError as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.USAGE
    except BrokerError as fault:
        what = (
            describe(fault) if isinstance(fault, BrokerRefused) else f"no connection to the broker: {describe(fault)}"
        )
        text = f"{what}; check ACESTEP_AMQP_URL, or ask acestep-consumer doctor"
        note.print(text, style="red", markup=False, soft_wrap=True)
        return Exit.UNREACHABLE
    return Exit.DONE


class _StatusProbe:
    """The witnesses together."""

    def __init__(
        self,
        settings: BrokerSettings,
        tiers: tuple[str, ...] | None,
        inspection: BrokerInspection,
        monitor: ManagementClient | None,
    ) -> None:
        self._settings = settings
        self._tiers = tiers
        self._inspection = inspection
        self._monitor = monitor
        self._heard = ObservedEvents(time.monotonic())
        self._asked_s: float | None = None
        self._notes: dict[str, str] = {} if monitor else {"monitor": _UNMONITORED}
        # Set once somebody listens, or it is known that nobody can for now.
        self.settled = asyncio.Event()
        self.declared = asyncio.Event()

    def listens(self) -> None:
        """Count from now: nothing was heard before."""
        self._heard = ObservedEvents(time.monotonic())
        self.settled.set()

    def hear(self, event: JobEvent | WorkerEvent) -> None:
        """Take in an event."""
        self._heard.hear(event, time.monotonic())

    def is_deaf(self, why: str) -> None:
        """Note that no events can be heard."""
        self._notes["events"] = f"events are not heard: {why}"
        self.settled.set()

    def asked(self, refusal: str | None) -> None:
        """Note whether the workers could be asked to announce themselves."""
        self._notes.pop("asking", None)
        if refusal is not None:
            self._notes["asking"] = refusal
        elif self._asked_s is None:
            self._asked_s = time.monotonic()

    async def status(self) -> StatusReport:
        """Ask everybody. Raises ``BrokerError`` when the broker is out of reach."""
        of_tiers = map(tier_queue, self._tiers or ())
        depths = await self._inspection.depths((GENERATE, DEAD_LETTER, UNROUTED, *of_tiers))
        declared = depths[GENERATE] is not None
        (self.declared if declared else self.settled).set()
        seen = StatusInputs(
            broker=self._inspection.address,
            version=self._inspection.version,
            limit=self._settings.queue_maxsize,
            depths=depths,
            tiers=self._tiers,
            asked_s=self._asked_s,
            monitored=await self._monitored() if declared else None,
            heard=self._heard,
            now_s=time.monotonic(),
        )
        return status_of(seen, (*self._notes.values(), *(() if declared else (_UNDECLARED,))))

    async def _monitored(self) -> RequestQueue | None:
        if self._monitor is None:
            return None
        try:
            found = await self._monitor.request_queue()
        except BrokerError as fault:
            self._notes["monitor"] = describe(fault)
            return None
        self._notes.pop("monitor", None)
        return found


@asynccontextmanager
async def _looking(settings: BrokerSettings, tiers: tuple[str, ...] | None) -> AsyncIterator[_StatusProbe]:
    async with AsyncExitStack() as stack:
        inspection = await stack.enter_async_context(BrokerInspection(settings, _NAME))
        monitor = await stack.enter_async_context(ManagementClient(settings)) if settings.management_url else None
        look = _StatusProbe(settings, tiers, inspection, monitor)
        # At first, so that no queue is made for listening where there is nothing to listen to.
        await look.status()
        listening = asyncio.create_task(_listen(settings, look), name="listen")
        try:
            await look.settled.wait()
            yield look
        finally:
            listening.cancel()
            await asyncio.wait({listening})


async def _listen(settings: BrokerSettings, look: _StatusProbe) -> None:
    """Hear events until cancelled; a user who may not is told so, and the rest goes on."""
    await look.declared.wait()
    try:
        async with Client(settings.every_url.get_secret_value()) as client, client.subscribe() as events:
            look.listens()
            async with _asking(client, look):
                async for event in events:
                    look.hear(event)
    except ClientError as error:
        look.is_deaf(str(error))


@asynccontextmanager
async def _asking(client: Client, look: _StatusProbe) -> AsyncIterator[None]:
    """Let the workers announce themselves again and again: what they have in hand changes all the time."""

    async def ask() -> None:
        while True:
            try:
                await client.call_roll()
                look.asked(None)
            except ClientError as error:
                look.asked(str(error))
            await asyncio.sleep(ASK_EVERY_S)

    asking = asyncio.create_task(ask(), name="ask")
    try:
        yield
    finally:
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


async def _once(look: _StatusProbe, order: StatusOptions) -> None:
    answer = await look.status()
    if order.as_json:
        sys.stdout.write(answer.model_dump_json(indent=2) + "\n")
    else:
        Console(highlight=False).print(picture(answer))


async def _watch(look: _StatusProbe, order: StatusOptions, note: Console) -> None:
    """Show it again and again; a broker that goes away is waited for."""
    with drawing(Console(highlight=False)) as draw:
        while True:
            try:
                answer = await look.status()
            except BrokerError as fault:
                text = f"the broker is out of reach: {describe(fault)}; trying again. Ctrl-C ends"
                note.print(text, style="red", markup=False) if order.as_json else draw(text)
            else:
                _print_line(answer) if order.as_json else draw(picture(answer))
            await asyncio.sleep(order.every_s)


def _print_line(answer: StatusReport) -> None:
    sys.stdout.write(answer.model_dump_json() + "\n")
    sys.stdout.flush()
