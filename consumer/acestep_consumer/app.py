# SPDX-License-Identifier: Apache-2.0
"""The composition root: what is started in which order, and why; and the same backwards.

Everything that can refuse to start does so before the first message is taken.
"""

import asyncio
import gc
import os
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.tier_queues import TierQueues
from acestep_consumer.broker.versions import ack_timeout_warning
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.logs import set_log_level, set_up_logs
from acestep_consumer.config.settings import Settings, SettingsError
from acestep_consumer.domain.errors import ConsumerError, DiskFull, StorageUnavailable
from acestep_consumer.domain.ports import Delivery, Routes
from acestep_consumer.engine.engines import Engines
from acestep_consumer.engine.interface import EngineSet
from acestep_consumer.engine.supervisor import EngineUnusable
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.execution.retries import RetryPolicy
from acestep_consumer.execution.scratch import scratch_root
from acestep_consumer.execution.tier_forwarding import NoForwarding, TierForwarding
from acestep_consumer.inputs.fetch import AllowedInputs
from acestep_consumer.observability.http import HealthServer
from acestep_consumer.observability.job_stats import JobObserver, JobStats, Refusals
from acestep_consumer.observability.tracing import set_up_tracing
from acestep_consumer.pipeline import Pipeline, Ports, Rules
from acestep_consumer.policy.tier_choice import queue_names
from acestep_consumer.policy.tiers import TierTableError, load_table
from acestep_consumer.storage.attempts import S3AttemptStore
from acestep_consumer.storage.disk import POLL_S, DiskGuard, GuardedInputs, GuardedRenderer
from acestep_consumer.storage.objects import Objects
from acestep_consumer.storage.outage import OutageGate, RetryingAttempts, RetryingInputs, RetryingStore
from acestep_consumer.storage.results import S3Store
from acestep_consumer.storage.s3_client import S3Connection, S3Refused
from acestep_consumer.worker.announcements import Announcements
from acestep_consumer.worker.control import ControlChannel
from acestep_consumer.worker.expirations import ExpirationHandler
from acestep_consumer.worker.intake import Intake
from acestep_consumer.worker.readiness import WorkerState
from acestep_consumer.worker.reload import Reloader
from acestep_consumer.worker.signals import Signals

S3_PATIENCE_S = 10.0
"""Then it is an outage, and work in hand waits for its end (``acestep_consumer.storage.outage``)."""

STORAGE, DISK = "storage", "disk"
"""Reasons to take nothing new."""

log = structlog.get_logger()


async def run_worker(
    settings: Settings,
    *,
    grace_s: float,
    engines: EngineSet | None = None,
    read_again: Callable[[], Settings] | None = None,
) -> Exit:
    """Run until told to stop; returns the exit code.

    Args:
        settings: all sections.
        grace_s: seconds that work in hand may take after the first signal.
        engines: other engines than the supervised processes; benchmarks give instant ones.
        read_again: reads the settings anew, for SIGHUP; None: they stay as they are.
    """
    as_json = set_up_logs(settings.worker.log_level, settings.worker.log_format)
    try:
        table = load_table(settings.worker.tier_table)
        engines = engines or Engines(settings, table, log_json=as_json)
        await Worker(settings, engines, grace_s, read_again).run()
    except StorageUnavailable as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        # A refusal stays; an outage passes, and a supervisor may try again.
        return Exit.USAGE if isinstance(error, S3Refused) else Exit.UNREACHABLE
    except (SettingsError, TierTableError, BrokerRefused, ConsumerError) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        return Exit.USAGE
    except EngineUnusable as error:
        log.error("the engine cannot work", reason=str(error))  # noqa: TRY400 - as above
        return Exit.ENGINE
    return Exit.DONE


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is there when the start has come to the first message."""

    intake: Intake
    announcements: Announcements
    obituary: ExpirationHandler


class Worker:
    """One worker: its parts, their start, and their end."""

    def __init__(
        self,
        settings: Settings,
        engines: EngineSet,
        grace_s: float,
        read_again: Callable[[], Settings] | None = None,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._grace_s = grace_s
        self._id = settings.worker.worker_id or f"{socket.gethostname().split('.')[0]}-{os.getpid()}"
        self._began = time.perf_counter()
        self._jobs = JobStats()
        self._costs = CostModel()
        self._patience = OutageGate(self._on_storage)
        self._links = {
            use: BrokerConnection(settings.broker, f"acestep-consumer {self._id} {use}", with_stream=False)
            for use in ("publish", "consume")
        }
        self._control = ControlChannel(settings.broker, f"acestep-consumer {self._id} control")
        # Of cards and what they may be asked for; only who sends requests on needs to know of others.
        self._table = load_table(settings.worker.tier_table) if settings.broker.route_by_tier else None
        refusals = Refusals()
        self._publisher = Publisher(self._links["publish"], self._id, refusals.add)
        self._seen = WorkerState(
            settings=settings,
            engines=engines,
            links=tuple(self._links.values()),
            patience=self._patience,
            jobs=self._jobs,
            refusals=refusals,
        )
        self._routes = self._new_routes()
        self._reloader = Reloader(read_again or (lambda: settings), settings, self._apply)
        self._signals = Signals(self._reloader.ask)
        # What comes with the start. Settings that are read again reach it from then on.
        self._objects: Objects | None = None
        self._store: RetryingStore | None = None
        self._inputs: AllowedInputs | None = None
        self._intake: Intake | None = None

    async def run(self) -> None:
        """Start, work, stop."""
        set_up_tracing(self._id)
        with self._signals.heard():
            async with AsyncExitStack() as stack:
                stack.callback(asyncio.create_task(self._reloader.run(), name="reloader").cancel)
                prepared = await self._signals.unless_stopped(self._prepare(stack))
                if prepared is not None:
                    await self._begin(prepared)
                    await self._work(prepared.intake)

    async def _prepare(self, stack: AsyncExitStack) -> _Prepared:
        """Do all that comes before the first message. Nothing is in hand, so this may be cancelled at any point."""
        worker, seen = self._settings.worker, self._seen
        # Health first: an orchestrator must see a live process while gigabytes of weights load.
        metrics = seen.metrics().render
        pages = HealthServer(seen.checks(), metrics, worker.http_host, worker.http_port, engines=seen.engine_states)
        health = await stack.enter_async_context(pages)
        log.info("starting", worker=self._id, health=f"http://{worker.http_host}:{health.port}/readyz")
        scratch = await self._open_scratch(stack)
        # The engines are the slowest and need nobody: they load while the rest connects.
        loading = asyncio.create_task(self._engines.start(), name="engines start")
        stack.push_async_callback(self._engines.stop)
        stack.callback(loading.cancel)
        # Storage before the broker: a message is taken only when its songs have a place.
        connection = S3Connection(self._settings.storage, patience_s=S3_PATIENCE_S)
        seen.traffic = connection.traffic
        self._objects = objects = Objects(await stack.enter_async_context(connection))
        seen.store = S3Store(objects, self._settings.storage)
        self._store = store = RetryingStore(seen.store, self._patience)
        await seen.store.check()
        self._inputs = inputs = self._new_inputs(objects)
        await stack.enter_async_context(inputs)
        await stack.enter_async_context(self._links["publish"])
        log.info("broker and storage ready", after_s=round(time.perf_counter() - self._began, 2))
        await loading
        await stack.enter_async_context(self._control)
        await stack.enter_async_context(self._links["consume"])
        seen.disk = disk = DiskGuard(scratch, lambda: self._settings.engine.scratch_min_gb, self._on_disk)
        await disk.look()
        stack.callback(asyncio.create_task(disk.run(), name="disk").cancel)
        seen.consumer = consumer = self._new_consumer(scratch, disk, objects, store, inputs)
        link = self._links["publish"]
        announcements = Announcements(
            self._id, self._publisher, link, engines=self._engines, consumer=consumer, costs=self._costs
        )
        tiers = self._new_tier_queues(consumer)
        self._intake = intake = Intake(consumer, self._engines.renderer_usage, announcements, tiers)
        return _Prepared(intake, announcements, ExpirationHandler(store, self._publisher, self._id))

    async def _begin(self, prepared: _Prepared) -> None:
        """Start consuming: from here on messages are in hand."""
        # What is alive now stays alive: the garbage collector need not look through it again and again.
        gc.collect()
        gc.freeze()
        if self._seen.disk is not None and self._seen.disk.full:
            await prepared.intake.hold(DISK, on=True)
        await prepared.intake.start()
        await prepared.announcements.ready()
        self._warn()
        workers = self._settings.broker.queue_workers
        prefetch = workers or f"auto, from {self._settings.broker.workers_at_start}"
        prepared.announcements.log_ready(prefetch=prefetch, after_s=time.perf_counter() - self._began)
        await self._control.attend(prepared.obituary.tell, prepared.announcements.ready)

    async def _work(self, intake: Intake) -> None:
        """Stay until a signal comes or the engine gives up, then drain."""
        stopping = asyncio.create_task(self._signals.stop.wait())
        broken = asyncio.create_task(self._engines.wait_unusable())
        intake.pace(self._settings.broker)
        await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # Work in hand cannot end without its engine: it goes back at once.
        await intake.drain(0 if broken.done() else self._grace_s, self._signals.hurry)
        if broken.done():
            broken.result()
        broken.cancel()

    async def _open_scratch(self, stack: AsyncExitStack) -> Path:
        """A folder of this worker's own, what killed workers left removed; a disk without room for it is waited for."""
        folder, told = self._settings.engine.scratch_dir, False
        while True:
            try:
                return stack.enter_context(scratch_root(folder))
            except DiskFull:
                if not told:
                    log.error("scratch disk is full: nothing is taken", folder=str(folder or "the system's"))  # noqa: TRY400 - the text is the whole story
                told = True
            except OSError as error:
                raise SettingsError(f"ACESTEP_SCRATCH_DIR: {error.filename}: {error.strerror}") from error
            await asyncio.sleep(POLL_S)

    def _new_routes(self) -> Routes:
        """Where requests go that another card is better for. What goes there is counted, from 0: a first step shows."""
        if self._table is None:
            return NoForwarding()
        routes = TierForwarding(self._engines.limits, self._table)
        routes.sent.update({tier.name: 0 for tier in self._table.tiers[1:]})
        self._seen.sent_on = routes.sent
        return routes

    def _new_inputs(self, objects: Objects) -> AllowedInputs:
        settings = self._settings
        checkpoint_dir = settings.engine.checkpoint_dir
        return AllowedInputs(objects, settings.storage, settings.inputs, checkpoint_dir=checkpoint_dir)

    def _new_consumer(
        self, scratch: Path, disk: DiskGuard, objects: Objects, store: RetryingStore, inputs: AllowedInputs
    ) -> Consumer:
        settings = self._settings
        attempts = RetryingAttempts(S3AttemptStore(objects, settings.storage), self._patience)
        trials = RetryPolicy(attempts, settings.worker.max_attempts)
        ports = Ports(
            store=store,
            routes=self._routes,
            trials=trials,
            cancellations=self._control.cancellations,
            inputs=RetryingInputs(GuardedInputs(inputs, disk), self._patience),
            planner=self._engines.planner,
            renderer=GuardedRenderer(self._engines.renderer, disk),
            events=self._publisher,
            chronicle=JobObserver(self._jobs, self._costs),
        )
        rules = Rules(
            worker_id=self._id,
            scratch=scratch,
            limits=self._engines.limits,
            max_message_bytes=settings.broker.max_message_bytes,
            execution_timeout_s=lambda: self._settings.worker.execution_timeout_s,
        )
        pipeline = Pipeline(ports, rules)
        # Said as soon as the connection is gone: the next worker counts what nobody excused.
        self._links["consume"].on_loss(trials.excuse_lost)

        async def process(delivery: Delivery) -> None:
            await disk.look()
            await pipeline.process(delivery)

        return Consumer(self._links["consume"], settings.broker, process, self._publisher)

    def _new_tier_queues(self, consumer: Consumer) -> TierQueues | None:
        """The way in for what smaller cards send on. The engines have been started."""
        if self._table is None:
            return None
        own, tiers = self._engines.limits().tier.name, queue_names(self._table)
        return TierQueues(self._control.link, consumer, own=own, tiers=tiers, notify_tier=self._publisher.notify_tier)

    async def _on_storage(self, away: bool) -> None:  # noqa: FBT001 - a callback's one argument
        """Take no messages whose songs have no place."""
        await self._hold(STORAGE, on=away)

    async def _on_disk(self, full: bool) -> None:  # noqa: FBT001 - as above
        """Take no messages whose songs cannot be written down."""
        await self._hold(DISK, on=full)

    async def _hold(self, reason: str, *, on: bool) -> None:
        if self._intake is not None:
            await self._intake.hold(reason, on=on)

    async def _apply(self, settings: Settings) -> None:
        """Let settings hold that were read again. Work in hand goes on as it began. Raises ``SettingsError``."""
        if self._inputs is not None:
            self._inputs.allow(settings.inputs)
        before, self._settings = self._settings, settings
        set_log_level(settings.worker.log_level)
        if self._store is not None and self._objects is not None:
            self._store.use(S3Store(self._objects, settings.storage))
        if self._intake is not None and not self._signals.stop.is_set() and before.broker != settings.broker:
            await self._intake.change(settings.broker)

    def _warn(self) -> None:
        """Write into the log what the operator should know about this start."""
        for warning in self._engines.warnings():
            log.warning("engine", note=warning)
        broker, longest_s = self._settings.broker, self._settings.worker.execution_timeout_s
        version = self._links["consume"].server_version
        if note := ack_timeout_warning(version, broker.queue_type, longest_s, broker.consumer_timeout_s):
            log.warning("broker", note=note)
