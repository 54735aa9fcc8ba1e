# SPDX-License-Identifier: Apache-2.0
"""Shows the queue and its workers, once or live.

Three sources. AMQP: how many messages wait. Events: how jobs end, and what workers report when they are asked; only
while this command listens. The management API, if ``ACESTEP_MANAGEMENT_URL`` is set: unacknowledged messages, prefetch
and rates.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from acestep_consumer.broker.errors import CHECK_BROKER, BrokerError, BrokerRefused, describe
from acestep_consumer.broker.inspection import BrokerInspection
from acestep_consumer.broker.management import ManagementClient, RequestQueue
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, UNROUTED, tier_queue
from acestep_consumer.client import Client, ClientError
from acestep_consumer.commands.base import print_error
from acestep_consumer.commands.status.report import ASK_EVERY_S, ObservedEvents, StatusInputs, StatusReport, status_of
from acestep_consumer.commands.status.table import table
from acestep_consumer.commands.terminal import BROKER, live_display, silence_client, waiting_for
from acestep_consumer.commands.topology import tier_names
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import BrokerSettings, Settings
from acestep_consumer.policy.tiers import TierTableError
from acestep_schemas.events import JobEvent, WorkerEvent

_NAME: Final = "acestep-consumer status"
_UNMONITORED: Final = "set ACESTEP_MANAGEMENT_URL to include workers that do not answer"
_UNDECLARED: Final = f"there is no queue {GENERATE} yet: start a worker, or run acestep-consumer topology --declare"


@dataclass(frozen=True, slots=True)
class StatusOptions:
    """Options of ``status``. ``sample_s``: seconds to listen before the first report; ``every_s``: between two."""

    watch: bool
    sample_s: float
    every_s: float
    as_json: bool


async def status(settings: Settings, options: StatusOptions, note: Console) -> Exit:
    """Print the status, once or until Ctrl-C."""
    silence_client()
    try:
        asked = BROKER if settings.broker.management_url is None else f"{BROKER}, or ACESTEP_MANAGEMENT_URL"
        with waiting_for(asked, note) as answered:
            async with _probe(settings.broker, tier_names(settings)) as probe:
                answered()
                if options.sample_s and not options.as_json:
                    note.print(f"listening to events for {options.sample_s:g} s …", style="dim")
                await asyncio.sleep(options.sample_s)
                await (_watch(probe, options, note) if options.watch else _once(probe, options))
    except TierTableError as error:
        print_error(str(error), note)
        return Exit.USAGE
    except BrokerError as error:
        reason = describe(error)
        if not isinstance(error, BrokerRefused):
            reason = f"no connection to the broker: {reason}"
        print_error(f"{reason}; {CHECK_BROKER}", note)
        return Exit.UNREACHABLE
    return Exit.DONE


class _StatusProbe:
    """Combines the three sources."""

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
        self._observed = ObservedEvents(time.monotonic())
        self._asked_s: float | None = None
        self._notes: dict[str, str] = {} if monitor else {"monitor": _UNMONITORED}
        # Set once events are subscribed to, or that has failed.
        self.settled = asyncio.Event()
        self.declared = asyncio.Event()

    def subscribed(self) -> None:
        """Start counting events."""
        self._observed = ObservedEvents(time.monotonic())
        self.settled.set()

    def add(self, event: JobEvent | WorkerEvent) -> None:
        """Count an event."""
        self._observed.add(event, time.monotonic())

    def cannot_subscribe(self, why: str) -> None:
        """Note that events cannot be received."""
        self._notes["events"] = f"no events received: {why}"
        self.settled.set()

    def asked(self, refusal: str | None) -> None:
        """Note whether workers could be asked for their status."""
        self._notes.pop("asking", None)
        if refusal is not None:
            self._notes["asking"] = refusal
        elif self._asked_s is None:
            self._asked_s = time.monotonic()

    async def status(self) -> StatusReport:
        """Ask all sources. Raises ``BrokerError`` if the broker is unreachable."""
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
            observed=self._observed,
            now_s=time.monotonic(),
        )
        return status_of(seen, (*self._notes.values(), *(() if declared else (_UNDECLARED,))))

    async def _monitored(self) -> RequestQueue | None:
        if self._monitor is None:
            return None
        try:
            found = await self._monitor.request_queue()
        except BrokerError as error:
            self._notes["monitor"] = describe(error)
            return None
        self._notes.pop("monitor", None)
        return found


@asynccontextmanager
async def _probe(settings: BrokerSettings, tiers: tuple[str, ...] | None) -> AsyncIterator[_StatusProbe]:
    async with AsyncExitStack() as stack:
        inspection = await stack.enter_async_context(BrokerInspection(settings, _NAME))
        monitor = await stack.enter_async_context(ManagementClient(settings)) if settings.management_url else None
        probe = _StatusProbe(settings, tiers, inspection, monitor)
        # Before subscribing, so that no subscriber queue is declared on an empty broker.
        await probe.status()
        listening = asyncio.create_task(_listen(settings, probe), name="listen")
        try:
            await probe.settled.wait()
            yield probe
        finally:
            listening.cancel()
            await asyncio.wait({listening})


async def _listen(settings: BrokerSettings, probe: _StatusProbe) -> None:
    """Count events until cancelled. A login without the permission gets a note and everything else."""
    await probe.declared.wait()
    try:
        async with Client(settings.every_url.get_secret_value()) as client, client.subscribe() as events:
            probe.subscribed()
            async with _asking(client, probe):
                async for event in events:
                    probe.add(event)
    except ClientError as error:
        probe.cannot_subscribe(str(error))


@asynccontextmanager
async def _asking(client: Client, probe: _StatusProbe) -> AsyncIterator[None]:
    """Ask the workers for their status repeatedly: the number of running jobs changes all the time."""

    async def ask() -> None:
        while True:
            try:
                await client.request_statuses()
                probe.asked(None)
            except ClientError as error:
                probe.asked(str(error))
            await asyncio.sleep(ASK_EVERY_S)

    asking = asyncio.create_task(ask(), name="ask")
    try:
        yield
    finally:
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


async def _once(probe: _StatusProbe, options: StatusOptions) -> None:
    report = await probe.status()
    if options.as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        Console(highlight=False).print(table(report))


async def _watch(probe: _StatusProbe, options: StatusOptions, note: Console) -> None:
    """Show the status repeatedly, and keep trying while the broker is unreachable."""
    with live_display(Console(highlight=False)) as draw:
        while True:
            try:
                report = await probe.status()
            except BrokerError as error:
                text = f"broker unreachable: {describe(error)}; retrying. Press Ctrl-C to stop"
                print_error(text, note) if options.as_json else draw(text)
            else:
                _print_line(report) if options.as_json else draw(table(report))
            await asyncio.sleep(options.every_s)


def _print_line(report: StatusReport) -> None:
    sys.stdout.write(report.model_dump_json() + "\n")
    sys.stdout.flush()
