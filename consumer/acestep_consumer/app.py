# SPDX-License-Identifier: Apache-2.0
"""Composition root: creates a worker's parts, starts them in order, and stops them in reverse.

Everything that can refuse to start does so before the first message is taken.
"""

import asyncio
import errno
import gc
import os
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import structlog

from acestep_consumer.broker.connection import UNUSED_CLOSE_TIMEOUT_S, BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.identified_queue import IdentifiedQueue
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.tier_queues import TierQueues
from acestep_consumer.broker.topology import connection_name
from acestep_consumer.broker.versions import ack_timeout_warning
from acestep_consumer.config.exit_codes import Exit, unexpected
from acestep_consumer.config.logs import set_log_level, set_up_logs
from acestep_consumer.config.settings import Settings, SettingsError
from acestep_consumer.domain.errors import ConsumerError, DiskFull, StorageRefused, StorageUnavailable
from acestep_consumer.domain.parse import RequestRules
from acestep_consumer.domain.ports import Objects, Routes
from acestep_consumer.engine.engines import Engines
from acestep_consumer.engine.interface import EngineSet
from acestep_consumer.engine.renderer.checkpoints.checkpoint_check import check_checkpoints
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError
from acestep_consumer.engine.supervisor import EngineUnusable
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.execution.retries import RetryPolicy
from acestep_consumer.execution.runner import JobRules, JobRunner
from acestep_consumer.execution.scratch import ScratchRoot
from acestep_consumer.execution.stage_limits import StageLimits
from acestep_consumer.execution.tier_forwarding import NoForwarding, TierForwarding
from acestep_consumer.inputs.fetch import AllowedInputs
from acestep_consumer.inputs.source_songs import StoredSongs
from acestep_consumer.observability.http import HealthServer
from acestep_consumer.observability.job_stats import JobObserver, JobStats, Refusals
from acestep_consumer.observability.tracing import TracingMisconfigured, set_up_tracing
from acestep_consumer.pipeline import Pipeline, Ports
from acestep_consumer.policy.scoring import ScoreTableError, load_score_table
from acestep_consumer.policy.tier_choice import served_names
from acestep_consumer.policy.tiers import TierTableError, load_table
from acestep_consumer.storage.adapter import open_objects
from acestep_consumer.storage.attempts import AttemptRecords
from acestep_consumer.storage.disk import POLL_S, DiskGuard, GuardedInputs, GuardedRenderer
from acestep_consumer.storage.outage import OutageGate, RetryingAttempts, RetryingInputs, RetryingStore, watch
from acestep_consumer.storage.results import ResultStore
from acestep_consumer.worker.announcements import Announcements
from acestep_consumer.worker.control import ControlChannel
from acestep_consumer.worker.expirations import ExpirationHandler
from acestep_consumer.worker.intake import Intake
from acestep_consumer.worker.readiness import WorkerState
from acestep_consumer.worker.reload import Reloader
from acestep_consumer.worker.signals import Signals

S3_RETRY_S = 10.0
"""Seconds of retries within one call to S3. After that it is an outage, and running jobs wait (``storage.outage``)."""

LOADING_REPORT_S = 10.0
"""How often a worker reports that it is still loading."""

STORAGE, DISK = "storage", "disk"
"""Reasons to pause consuming."""

log = structlog.get_logger()


async def run_worker(
    settings: Settings,
    *,
    grace_s: float,
    engines: EngineSet | None = None,
    read_again: Callable[[], Settings] | None = None,
) -> Exit:
    """Run a worker until a signal stops it; return the exit code.

    Args:
        settings: all sections.
        grace_s: seconds that running jobs may take after the first signal.
        engines: other engines than the supervised processes, for benchmarks.
        read_again: reads the settings again, for SIGHUP; None: they cannot be reloaded.
    """
    as_json = set_up_logs(settings.worker.log_level, settings.worker.log_format)
    worker: Worker | None = None
    try:
        table = load_table(settings.worker.tier_table)
        load_score_table(settings.engine.score_table)  # its reader is the renderer, which takes a while to start
        if engines is None:
            await asyncio.to_thread(check_checkpoints, settings.engine)
            engines = Engines(settings, table, log_json=as_json)
        worker = Worker(settings, engines, grace_s, read_again)
        await worker.run()
    except StorageUnavailable as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        # A refusal is permanent; an outage passes, and a process supervisor may start us again.
        return Exit.USAGE if isinstance(error, StorageRefused) else Exit.UNREACHABLE
    except (SettingsError, TierTableError, ScoreTableError, BrokerRefused, ConsumerError) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        return Exit.USAGE
    except (CheckpointError, EngineUnusable) as error:
        log.error("engine cannot start", reason=str(error))  # noqa: TRY400 - as above
        return Exit.ENGINE
    except Exception as error:
        if worker is not None and worker.started:
            log.exception("worker ended by an unexpected error")
        else:
            log.error("cannot start", reason=unexpected(error))  # noqa: TRY400 - as above
            log.debug("start failed here", exc_info=error)
        return Exit.UNEXPECTED
    return Exit.DONE


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Parts that exist once everything before the first message is done."""

    intake: Intake
    announcements: Announcements
    expirations: ExpirationHandler


class Worker:
    """One worker process: its parts, their start and their stop."""

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
        self._id = settings.worker.id_or_own
        self._began = time.perf_counter()
        self._jobs = JobStats()
        self._costs = CostModel()
        self._outage = OutageGate(self._on_storage, self._ask_storage)
        self._connections = {
            use: BrokerConnection(settings.broker, connection_name(self._id, use), with_stream=False)
            for use in ("publish", "consume")
        }
        self._control = ControlChannel(settings.broker, connection_name(self._id, "control"))
        # Limits of the other tiers: needed with tier routing only.
        self._table = load_table(settings.worker.tier_table) if settings.broker.route_by_tier else None
        refusals = Refusals()
        self._publisher = Publisher(self._connections["publish"], self._id, refusals.add)
        self._stages = StageLimits(engines.capacity)
        self._state = WorkerState(
            settings=settings,
            engines=engines,
            connections=tuple(self._connections.values()),
            outage=self._outage,
            jobs=self._jobs,
            refusals=refusals,
            stages=self._stages,
        )
        self._routes = self._new_routes()
        self._reloader = Reloader(read_again or (lambda: settings), settings, self._apply)
        self._signals = Signals(self._reloader.ask)
        # Created by the start; reloaded settings are applied to them.
        self._objects: Objects | None = None
        self._store: RetryingStore | None = None
        self._inputs: AllowedInputs | None = None
        self._songs: StoredSongs | None = None
        self._runner: JobRunner | None = None
        self._intake: Intake | None = None
        self.started = False
        """Whether it has begun to consume."""

    async def run(self) -> None:
        """Start, consume, stop."""
        try:
            set_up_tracing(self._id)
        except TracingMisconfigured as error:
            raise SettingsError(str(error)) from error
        with self._signals.handled():
            async with AsyncExitStack() as stack:
                stack.callback(asyncio.create_task(self._reloader.run(), name="reloader").cancel)
                try:
                    prepared = await self._signals.unless_stopped(self._prepare(stack))
                    if prepared is not None:
                        # Stopped in the middle, it may consume already: it drains.
                        await self._signals.unless_stopped(self._begin(prepared))
                        await self._consume(prepared.intake)
                finally:
                    await self._disconnect()

    async def _disconnect(self) -> None:
        """Close all connections at once, with no job running: a broker that hangs shall not hold the end."""
        await self._control.stop_listening()
        connections = (*self._connections.values(), self._control.connection)
        await asyncio.gather(*(connection.close(UNUSED_CLOSE_TIMEOUT_S) for connection in connections))

    async def _prepare(self, stack: AsyncExitStack) -> _Prepared:
        """Do everything before the first message. No job is running yet, so this may be cancelled at any point."""
        worker, state = self._settings.worker, self._state
        # Health first: an orchestrator must see a live process while gigabytes of weights load.
        metrics = state.metrics().render
        pages = HealthServer(state.checks(), metrics, worker.http_host, worker.http_port, engines=state.engine_states)
        try:
            health = await stack.enter_async_context(pages)
        except (OSError, UnicodeError) as error:
            raise SettingsError(_cannot_listen(worker.http_host, worker.http_port, error)) from error
        log.info("starting", worker=self._id, health=f"http://{worker.http_host}:{health.port}/readyz")
        for name, reason in self._settings.without_effect.items():
            log.info("setting has no effect here", setting=name, reason=reason)
        for warning in self._settings.broker.url_warnings:
            log.warning("broker warning", note=warning)
        scratch = await self._open_scratch(stack)
        # The engines are the slowest part and depend on nothing: they load while the rest connects.
        loading = asyncio.create_task(self._engines.start(), name="engines start")
        stack.push_async_callback(self._engines.stop)
        stack.callback(loading.cancel)
        return await self._unless_unusable(loading, self._connect(stack, loading, scratch))

    async def _unless_unusable(self, loading: asyncio.Task[None], work: Coroutine[Any, Any, _Prepared]) -> _Prepared:
        """Return what ``work`` returns. Raises ``EngineUnusable`` at once: a broker that is away is waited for."""
        working = asyncio.create_task(work, name="connect")
        failing = asyncio.create_task(self._first_failure(loading), name="engines watch")
        try:
            await asyncio.wait((working, failing), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                failing.result()
            return await working
        finally:
            for task in (failing, working):
                task.cancel()
            # The one that did not decide may have failed too: gathered, nobody misses its error.
            await asyncio.gather(failing, working, return_exceptions=True)

    async def _first_failure(self, loading: asyncio.Task[None]) -> None:
        """Wait until an engine cannot be used. Raises ``EngineUnusable`` then."""
        await asyncio.wait({loading})
        loading.result()
        await self._engines.wait_unusable()

    async def _connect(self, stack: AsyncExitStack, loading: asyncio.Task[None], scratch: ScratchRoot) -> _Prepared:
        """Connect to storage and broker, wait for the engines, and create what consumes."""
        # Storage before the broker: no message is consumed before its songs can be stored.
        opening = open_objects(self._settings.storage, retry_s=S3_RETRY_S)
        self._objects = objects = await stack.enter_async_context(opening)
        state = self._state
        state.traffic = objects.traffic
        results = ResultStore(objects, self._settings.storage)
        await results.check()
        state.store = results
        self._store = store = RetryingStore(results, self._outage)
        stack.callback(asyncio.create_task(watch(self._outage, results.ready), name="storage").cancel)
        self._inputs = inputs = self._new_inputs(objects)
        await stack.enter_async_context(inputs)
        await stack.enter_async_context(self._connections["publish"])
        await stack.enter_async_context(self._control)
        await stack.enter_async_context(self._connections["consume"])
        log.info("broker and storage ready", after_s=round(time.perf_counter() - self._began, 2))
        await self._report_until(loading)
        state.disk = disk = DiskGuard(scratch, self._settings.engine.scratch_min_gb, self._on_disk)
        await disk.check()
        stack.callback(asyncio.create_task(disk.run(), name="disk").cancel)
        self._runner = runner = self._new_runner(disk, objects, store)
        state.consumer = consumer = self._new_consumer(runner, disk, store, inputs)
        announcements = Announcements(
            self._id,
            self._publisher,
            self._connections["publish"],
            engines=self._engines,
            consumer=consumer,
            costs=self._costs,
            running=self._jobs.running,
            stages=self._stages,
        )
        tiers = self._new_tier_queues(consumer)
        identified = IdentifiedQueue(self._control.connection, consumer)
        self._intake = intake = Intake(
            consumer, self._engines.renderer_usage, announcements, identified, tiers, lambda: self._stages.wanted
        )
        return _Prepared(intake, announcements, ExpirationHandler(store, self._publisher, runner))

    async def _begin(self, prepared: _Prepared) -> None:
        """Start consuming."""
        # All objects so far live as long as the worker: the garbage collector need not scan them again.
        gc.collect()
        gc.freeze()
        if self._state.disk is not None and self._state.disk.full:
            await prepared.intake.pause(DISK, on=True)
        if self._outage.away:
            await prepared.intake.pause(STORAGE, on=True)
        # First: a login that may not do this must stop the start before there are jobs.
        await self._control.listen(prepared.expirations.tell, prepared.announcements.ready, self._id)
        await prepared.intake.start()
        self.started = True
        await prepared.announcements.ready()
        self._warn()
        workers = self._settings.broker.queue_workers
        prefetch = workers or f"auto, from {self._settings.broker.workers_at_start}"
        prepared.announcements.log_ready(prefetch=prefetch, after_s=time.perf_counter() - self._began)

    async def _consume(self, intake: Intake) -> None:
        """Consume until a signal comes or an engine cannot be restarted, then drain."""
        stopping = asyncio.create_task(self._signals.stop.wait())
        broken = asyncio.create_task(self._engines.wait_unusable())
        intake.control_prefetch(self._settings.broker)
        await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # Running jobs cannot finish without an engine: they are requeued at once.
        await intake.drain(0 if broken.done() else self._grace_s, self._signals.hurry)
        if broken.done():
            broken.result()
        broken.cancel()

    async def _report_until(self, loading: asyncio.Task[None]) -> None:
        """Wait for the engines; a line now and then tells slow loading from a hang. Raises what ``loading`` raises."""
        while not (await asyncio.wait({loading}, timeout=LOADING_REPORT_S))[0]:
            log.info("still loading models", after_s=round(time.perf_counter() - self._began))
        loading.result()

    async def _open_scratch(self, stack: AsyncExitStack) -> ScratchRoot:
        """Create this worker's scratch folder and remove those of killed workers. Waits while the disk is full."""
        folder, logged = self._settings.engine.scratch_dir, False
        scratch = ScratchRoot(folder)
        stack.push(scratch)
        while True:
            try:
                # In a thread: removing what killed workers left can take a while.
                await asyncio.to_thread(scratch.__enter__)
            except DiskFull:
                if not logged:
                    log.error("scratch disk is full: waiting for space", folder=str(folder or "the system's"))  # noqa: TRY400 - the text is the whole story
                logged = True
            except OSError as error:
                fix = "name a folder that this user may write to, or one that can be made"
                raise SettingsError(f"ACESTEP_SCRATCH_DIR: {error.filename}: {error.strerror}; {fix}") from error
            else:
                return scratch
            await asyncio.sleep(POLL_S)

    def _new_routes(self) -> Routes:
        """Routes to larger tiers. Counters start at 0, so that Prometheus sees the first increase."""
        if self._table is None:
            return NoForwarding()
        routes = TierForwarding(self._engines.limits, self._table)
        routes.forwarded.update({tier.name: 0 for tier in self._table.tiers[1:]})
        self._state.forwarded = routes.forwarded
        return routes

    def _new_inputs(self, objects: Objects) -> AllowedInputs:
        settings = self._settings
        checkpoint_dir = settings.engine.checkpoint_dir
        return AllowedInputs(objects, settings.storage, settings.inputs, checkpoint_dir=checkpoint_dir)

    def _new_runner(self, disk: DiskGuard, objects: Objects, store: RetryingStore) -> JobRunner:
        settings = self._settings
        attempts = RetryingAttempts(AttemptRecords(objects, settings.storage), self._outage)
        retries = RetryPolicy(attempts, settings.worker.max_attempts)
        # As soon as the connection is lost, not when it is back: the next worker counts attempts that nobody excused.
        self._connections["consume"].on_loss(retries.excuse_lost)
        self._songs = songs = StoredSongs(store, allowed=settings.inputs.results == "all")
        return JobRunner(
            retries=retries,
            cancellations=self._control.cancellations,
            routes=self._routes,
            songs=songs,
            store=store,
            events=self._publisher,
            costs=self._costs,
            rules=JobRules(
                worker_id=self._id,
                scratch=disk.job_folder,
                tier_limits=self._engines.limits,
                request_rules=request_rules(settings),
                execution_timeout_s=settings.worker.execution_timeout_s,
                stages=self._stages,
            ),
        )

    def _new_consumer(
        self, runner: JobRunner, disk: DiskGuard, store: RetryingStore, inputs: AllowedInputs
    ) -> Consumer:
        ports = Ports(
            inputs=RetryingInputs(GuardedInputs(inputs, disk), self._outage),
            planner=self._engines.planner,
            renderer=GuardedRenderer(self._engines.renderer, disk),
            store=store,
            events=self._publisher,
            observer=JobObserver(self._jobs, self._costs),
        )
        pipeline = Pipeline(ports, runner)
        return Consumer(self._connections["consume"], self._settings.broker, pipeline.process, self._publisher)

    def _new_tier_queues(self, consumer: Consumer) -> TierQueues | None:
        """Create the consumer of tier queues. The engines have been started."""
        if self._table is None:
            return None
        own, tiers = self._engines.limits().tier.name, served_names(self._table)
        return TierQueues(
            self._control.connection, consumer, own=own, tiers=tiers, notify_tier=self._publisher.notify_tier
        )

    async def _on_storage(self, away: bool) -> None:  # noqa: FBT001 - a callback's one argument
        """Consume nothing whose songs could not be stored."""
        await self._pause(STORAGE, on=away)

    async def _ask_storage(self) -> None:
        """Raises ``StorageUnavailable``."""
        if self._state.store is not None:
            await self._state.store.ready()

    async def _on_disk(self, full: bool) -> None:  # noqa: FBT001 - as above
        """Consume nothing whose files could not be written."""
        await self._pause(DISK, on=full)

    async def _pause(self, reason: str, *, on: bool) -> None:
        if self._intake is not None:
            await self._intake.pause(reason, on=on)

    async def _apply(self, settings: Settings) -> None:
        """Apply reloaded settings. Running jobs keep the old ones. Raises ``SettingsError``."""
        if self._inputs is not None:
            self._inputs.apply(settings.inputs)
        before, self._settings = self._settings, settings
        set_log_level(settings.worker.log_level)
        self._engines.set_log_level(settings.worker.log_level)
        if self._songs is not None:
            self._songs.allowed = settings.inputs.results == "all"
        if self._state.disk is not None:
            self._state.disk.min_gb = settings.engine.scratch_min_gb
        if self._runner is not None:
            self._runner.rules = replace(
                self._runner.rules,
                request_rules=request_rules(settings),
                execution_timeout_s=settings.worker.execution_timeout_s,
            )
        if self._store is not None and self._objects is not None:
            self._store.use(ResultStore(self._objects, settings.storage))
        if self._intake is not None and not self._signals.stop.is_set() and before.broker != settings.broker:
            await self._intake.change(settings.broker)

    def _warn(self) -> None:
        """Log what the operator should know about this start."""
        for warning in self._engines.warnings():
            log.warning("engine warning", note=warning)
        broker, longest_s = self._settings.broker, self._settings.worker.execution_timeout_s
        version = self._connections["consume"].server_version
        if note := ack_timeout_warning(version, broker.queue_type, longest_s, broker.consumer_timeout_s):
            log.warning("broker warning", note=note)


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> str:
    """Say why the health pages cannot be served, and which setting to change."""
    if isinstance(error, UnicodeError):
        return f"ACESTEP_HTTP_HOST: {host!r} is not a host name or address"
    if error.errno == errno.EADDRINUSE:
        return f"ACESTEP_HTTP_PORT: port {port} on {host} is in use; a second worker on this machine needs another port"
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return f"ACESTEP_HTTP_HOST: cannot listen on {host}:{port}: {reason}"


def request_rules(settings: Settings) -> RequestRules:
    """Return the operator's rules for reading requests."""
    worker = settings.worker
    return RequestRules(
        max_bytes=settings.broker.max_message_bytes,
        strict=worker.strict_requests,
        defaults=worker.request_defaults,
    )
