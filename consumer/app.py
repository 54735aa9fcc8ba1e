# SPDX-License-Identifier: Apache-2.0
"""The composition root: what is started in which order, and why; and the same backwards.

Everything that can refuse to start does so before the first message is taken.
"""

import asyncio
import gc
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog

from consumer.attempts import Ledger
from consumer.broker.ack_timeout import ack_timeout_warning
from consumer.broker.connection import Link
from consumer.broker.consumer import Consumer
from consumer.broker.faults import BrokerRefused
from consumer.broker.publisher import Publisher
from consumer.chronicle import Chronicle
from consumer.commands.exits import Exit
from consumer.concurrency import Concurrency
from consumer.control import Control
from consumer.disk import POLL_S, Disk, WatchedInputs, WatchedRenderer
from consumer.engine.engines import Engines
from consumer.engine.messages import RendererReport
from consumer.engine.supervisor import EngineState, EngineUnusable
from consumer.engine.usage import Usage
from consumer.errors import ConsumerError, DiskFull, StorageUnavailable, Unpublished
from consumer.eta import CostModel
from consumer.fleet.lifeline import mute
from consumer.hangup import Terminal
from consumer.health import Check, Health
from consumer.inputs import AllowedInputs
from consumer.metrics import (
    EngineCollector,
    JobCollector,
    Metrics,
    PublisherCollector,
    ReadyCollector,
    RendererCollector,
    ScratchCollector,
    StorageCollector,
    WorkerCollector,
)
from consumer.obituary import Obituary
from consumer.objects import Objects
from consumer.pacer import Pacer
from consumer.patience import Patience, PatientAttempts, PatientInputs, PatientStore
from consumer.pipeline import Pipeline, Ports, Rules
from consumer.policy.admit import Limits
from consumer.policy.tiers import TierTableError, load_table
from consumer.ports import Delivery, Planner, Renderer
from consumer.reload import Reloader
from consumer.s3 import S3Connection, S3Refused
from consumer.scratch import scratch_root
from consumer.settings import Settings, SettingsError
from consumer.storage import S3Store
from consumer.tally import JobTally, Refusals
from consumer.telemetry import set_log_level, set_up_logs
from consumer.tracing import set_up_tracing
from consumer.traffic import Traffic
from consumer.trials import Trials
from schemas.events import Worker as WorkerData
from schemas.events import WorkerEvent

S3_PATIENCE_S = 10.0
"""Then it is an outage, and work in hand waits for its end (``consumer.patience``)."""

STORAGE, DISK = "storage", "disk"
"""Reasons to take nothing new."""

log = structlog.get_logger()


class EngineSet(Protocol):
    """The engines as the worker uses them; ``consumer.engine.engines.Engines`` is the real one."""

    @property
    def ready(self) -> bool:
        """Whether orders are welcome."""

    @property
    def states(self) -> Mapping[str, EngineState]:
        """Of each engine process, by name, whether it takes orders and how often it was replaced."""

    @property
    def renderer(self) -> Renderer:
        """Makes the songs."""

    @property
    def planner(self) -> Planner:
        """Fills in what requests leave open."""

    @property
    def report(self) -> RendererReport:
        """What the renderer found. Only after ``start``."""

    @property
    def renderer_usage(self) -> Usage:
        """How the renderer's device is used."""

    def limits(self) -> Limits:
        """What may be asked of this worker now. Only after ``start``."""

    def warnings(self) -> Iterable[str]:
        """What the operator should know about this start."""

    async def start(self) -> None:
        """Bring them up. Raises ``EngineUnusable``."""

    async def stop(self) -> None:
        """End them."""

    async def wait_unusable(self) -> None:
        """Wait until one gives up for good. Raises ``EngineUnusable`` then."""


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
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._store: S3Store | None = None
        self._traffic: Traffic | None = None
        self._jobs = JobTally()
        self._costs = CostModel()
        self._refusals = Refusals()
        self._patience = Patience(self._on_storage)
        self._links = {
            use: Link(settings.broker, f"acestep-consumer {self._id} {use}", with_stream=False)
            for use in ("publish", "consume")
        }
        self._control = Control(settings.broker, f"acestep-consumer {self._id} control")
        self._publisher = Publisher(self._links["publish"], self._id, self._refusals.add)
        self._consumer: Consumer | None = None
        self._objects: Objects | None = None
        self._inputs: AllowedInputs | None = None
        self._patient_store: PatientStore | None = None
        self._disk: Disk | None = None
        self._pacing: asyncio.Task[None] | None = None
        self._terminal = Terminal()
        self._reloader = Reloader(read_again or (lambda: settings), settings, self._apply)

    async def run(self) -> None:
        """Start, work, stop."""
        handlers = {
            signal.SIGTERM: self._on_signal,
            signal.SIGINT: self._on_signal,
            signal.SIGHUP: self._on_hangup,
        }
        set_up_tracing(self._id)
        with _signals(handlers):
            async with AsyncExitStack() as stack:
                stack.callback(asyncio.create_task(self._reloader.run(), name="reloader").cancel)
                if await self._unless_stopped(self._prepare(stack)):
                    await self._begin()
                    await self._work()

    async def _prepare(self, stack: AsyncExitStack) -> None:
        """Do all that comes before the first message. Nothing is in hand, so this may be cancelled at any point."""
        worker = self._settings.worker
        # Health first: an orchestrator must see a live process while gigabytes of weights load.
        metrics = self._metrics().render
        pages = Health(self._checks(), metrics, worker.http_host, worker.http_port, engines=self._engine_states)
        health = await stack.enter_async_context(pages)
        log.info("starting", worker=self._id, health=f"http://{worker.http_host}:{health.port}/readyz")
        scratch = await self._open_scratch(stack)
        # The engines are the slowest and need nobody: they load while the rest connects.
        loading = asyncio.create_task(self._engines.start(), name="engines start")
        stack.push_async_callback(self._engines.stop)
        stack.callback(loading.cancel)
        # Storage before the broker: a message is taken only when its songs have a place.
        connection = S3Connection(self._settings.storage, patience_s=S3_PATIENCE_S)
        self._traffic = connection.traffic
        self._objects = objects = Objects(await stack.enter_async_context(connection))
        self._store = store = S3Store(objects, self._settings.storage)
        await store.check()
        self._inputs = inputs = AllowedInputs(
            objects,
            self._settings.storage,
            self._settings.inputs,
            checkpoint_dir=self._settings.engine.checkpoint_dir,
        )
        await stack.enter_async_context(inputs)
        await stack.enter_async_context(self._links["publish"])
        log.info("broker and storage ready", after_s=round(time.perf_counter() - self._began, 2))
        await loading
        await stack.enter_async_context(self._control)
        await stack.enter_async_context(self._links["consume"])
        self._disk = disk = Disk(scratch, lambda: self._settings.engine.scratch_min_gb, self._on_disk)
        await disk.look()
        stack.callback(asyncio.create_task(disk.run(), name="disk").cancel)
        self._consumer = self._new_consumer(scratch, store, inputs, objects, disk)

    async def _begin(self) -> None:
        """Start consuming: from here on messages are in hand."""
        assert self._consumer is not None  # noqa: S101 - _prepare made it
        assert self._patient_store is not None  # noqa: S101 - as above
        # What is alive now stays alive: the garbage collector need not look through it again and again.
        gc.collect()
        gc.freeze()
        if self._disk is not None and self._disk.full:
            await self._consumer.pause(DISK)
        await self._consumer.start()
        await self._announce("ready")
        self._tell()
        obituary = Obituary(self._patient_store, self._publisher, self._id)
        await self._control.attend(obituary.tell, lambda: self._announce("ready"))

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do this, but not longer than until a signal. Tells whether it was done."""
        working = asyncio.create_task(work, name="start")
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            working.result()
            return True
        log.info("told to stop while starting")
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):  # whatever it was, it is not needed any more
            await working
        return False

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

    def _new_consumer(
        self, scratch: Path, store: S3Store, inputs: AllowedInputs, objects: Objects, disk: Disk
    ) -> Consumer:
        settings = self._settings
        self._patient_store = PatientStore(store, self._patience)
        attempts = PatientAttempts(Ledger(objects, settings.storage), self._patience)
        trials = Trials(attempts, settings.worker.max_attempts)
        ports = Ports(
            store=self._patient_store,
            trials=trials,
            cancellations=self._control.cancellations,
            inputs=PatientInputs(WatchedInputs(inputs, disk), self._patience),
            planner=self._engines.planner,
            renderer=WatchedRenderer(self._engines.renderer, disk),
            events=self._publisher,
            chronicle=Chronicle(self._jobs, self._costs),
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

    async def _on_storage(self, away: bool) -> None:  # noqa: FBT001 - a callback's one argument
        """Take no messages whose songs have no place."""
        await self._pause(STORAGE, on=away)

    async def _on_disk(self, full: bool) -> None:  # noqa: FBT001 - as above
        """Take no messages whose songs cannot be written down."""
        await self._pause(DISK, on=full)

    async def _pause(self, reason: str, *, on: bool) -> None:
        if self._consumer is not None:
            await (self._consumer.pause(reason) if on else self._consumer.resume(reason))

    async def _work(self) -> None:
        """Stay until a signal comes or the engine gives up, then drain."""
        assert self._consumer is not None  # noqa: S101 - _prepare made it
        stopping = asyncio.create_task(self._stop.wait())
        broken = asyncio.create_task(self._engines.wait_unusable())
        self._pace(self._consumer)
        await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        self._stop_pacing()
        # Work in hand cannot end without its engine: it goes back at once.
        await self._drain(self._consumer, 0 if broken.done() else self._grace_s)
        if broken.done():
            broken.result()
        broken.cancel()

    def _pace(self, consumer: Consumer) -> None:
        """Let the prefetch follow what the card can do, where the operator leaves it to us."""
        self._stop_pacing()
        broker = self._settings.broker
        if broker.queue_workers is None:
            policy = Concurrency(broker.workers_at_start, broker.queue_workers_max)
            pacer = Pacer(consumer, self._engines.renderer_usage, policy, lambda: self._announce("ready"))
            self._pacing = asyncio.create_task(pacer.run(), name="pacer")

    def _stop_pacing(self) -> None:
        pacing, self._pacing = self._pacing, None
        if pacing is not None:
            pacing.cancel()

    async def _apply(self, settings: Settings) -> None:
        """Let settings hold that were read again. Work in hand goes on as it began. Raises ``SettingsError``."""
        if self._inputs is not None:
            self._inputs.allow(settings.inputs)
        before, self._settings = self._settings, settings
        set_log_level(settings.worker.log_level)
        if self._patient_store is not None and self._objects is not None:
            self._patient_store.use(S3Store(self._objects, settings.storage))
        if self._consumer is not None and not self._stop.is_set() and before.broker != settings.broker:
            await self._change_workers(self._consumer)

    async def _change_workers(self, consumer: Consumer) -> None:
        self._pace(consumer)
        await consumer.set_prefetch(self._settings.broker.workers_at_start)
        await self._announce("ready")

    async def _drain(self, consumer: Consumer, grace_s: float) -> None:
        log.info("draining", in_hand=consumer.in_hand, grace_s=grace_s)
        await self._announce("draining")
        draining = asyncio.create_task(consumer.drain(grace_s))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done():
            log.warning("leaving at once", handed_back=consumer.in_hand)
            draining.cancel()
            await consumer.drain(0)
        await self._announce("stopped")

    async def _announce(self, state: Literal["ready", "draining", "stopped"]) -> None:
        limits = self._engines.limits()
        data = WorkerData(
            worker_id=self._id,
            state=state,
            prefetch=self._consumer.prefetch if self._consumer else self._settings.broker.workers_at_start,
            models=tuple(model.name for model in limits.models),
            tier=limits.tier.name,
            vram_gb=limits.vram_gb,
            in_hand=self._consumer.in_hand if self._consumer else 0,
            seconds_per_job=self._costs.seconds_per_job,
        )
        if state != "ready" and not self._links["publish"].is_up:
            log.warning("announcement dropped", state=state, reason="the broker is away, and leaving does not wait")
            return
        try:
            await self._publisher.announce(WorkerEvent.of(data))
        except Unpublished as error:
            log.warning("announcement dropped", state=state, reason=str(error))

    def _tell(self) -> None:
        workers = self._settings.broker.queue_workers
        for warning in self._engines.warnings():
            log.warning("engine", note=warning)
        broker, longest_s = self._settings.broker, self._settings.worker.execution_timeout_s
        version = self._links["consume"].server_version
        if note := ack_timeout_warning(version, broker.queue_type, longest_s, broker.consumer_timeout_s):
            log.warning("broker", note=note)
        limits = self._engines.limits()
        log.info(
            "ready",
            worker=self._id,
            device=self._engines.report.device_name,
            vram_gb=round(limits.vram_gb, 1),
            tier=limits.tier.name,
            models=[model.name for model in limits.models],
            lm=f"{limits.lm.model} on {limits.lm.backend}" if limits.lm else None,
            prefetch=workers or f"auto, from {self._settings.broker.workers_at_start}",
            after_s=round(time.perf_counter() - self._began, 2),
        )

    def _metrics(self) -> Metrics:
        scratch = self._settings.engine.scratch_dir or Path(tempfile.gettempdir())
        return Metrics(
            WorkerCollector(lambda: self._consumer, self._settings.broker.queue_maxsize),
            ReadyCollector(self._known_state),
            JobCollector(self._jobs),
            RendererCollector(lambda: self._engines.renderer_usage),
            EngineCollector(lambda: {name: state.restarts for name, state in self._engines.states.items()}),
            StorageCollector(lambda: self._traffic, lambda: self._patience.away),
            PublisherCollector(self._refusals),
            ScratchCollector(scratch),
        )

    def _known_state(self) -> dict[str, bool]:
        """The conditions of readiness as far as they are known without asking anybody: a scrape must not wait."""
        return {
            "broker": self._broker_is_up,
            "storage": self._store is not None and not self._patience.away,
            "models": self._engines.ready,
            "disk": self._disk_has_room,
        }

    def _engine_states(self) -> dict[str, dict[str, bool | int]]:
        return {name: asdict(state) for name, state in self._engines.states.items()}

    def _checks(self) -> dict[str, Check]:
        return {
            "broker": self._broker_up,
            "storage": self._storage_up,
            "models": self._models_up,
            "disk": self._room_on_disk,
        }

    @property
    def _broker_is_up(self) -> bool:
        return all(link.is_up for link in self._links.values()) and self._consumer is not None

    async def _broker_up(self) -> bool:
        return self._broker_is_up

    async def _storage_up(self) -> bool:
        if self._store is None or self._patience.away:
            return False
        await self._store.ready()
        return True

    async def _models_up(self) -> bool:
        return self._engines.ready

    @property
    def _disk_has_room(self) -> bool:
        return self._disk is not None and not self._disk.full

    async def _room_on_disk(self) -> bool:
        return self._disk_has_room

    def _on_signal(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _on_hangup(self) -> None:
        """Read the settings again; but when it is our terminal that went, leave."""
        if self._terminal.gone():
            mute()  # a line of log would be an error in the middle of a job
            self._on_signal()
        else:
            self._reloader.ask()


@contextmanager
def _signals(handlers: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """Call these on these signals. A SIGHUP that is ignored, as under nohup, stays so."""
    loop = asyncio.get_running_loop()
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in handlers if not (number == signal.SIGHUP and ignored)]
    for number in numbers:
        loop.add_signal_handler(number, handlers[number])
    # A fleet starts its workers with SIGHUP held back: one that came before now is delivered now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
