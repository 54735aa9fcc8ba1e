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
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import structlog

from consumer.broker.connection import Link
from consumer.broker.consumer import Consumer
from consumer.broker.faults import BrokerRefused
from consumer.broker.publisher import Publisher
from consumer.commands.exits import Exit
from consumer.concurrency import Concurrency
from consumer.engine.engines import Engines
from consumer.engine.messages import RendererReport
from consumer.engine.supervisor import EngineUnusable
from consumer.engine.usage import Usage
from consumer.errors import ConsumerError, Unpublished
from consumer.health import Check, Health
from consumer.inputs import AllowedInputs
from consumer.metrics import Metrics, RendererCollector, WorkerCollector
from consumer.objects import Objects
from consumer.pacer import Pacer
from consumer.patience import Patience, PatientInputs, PatientStore
from consumer.pipeline import Pipeline, Ports, Rules
from consumer.policy.admit import Limits
from consumer.policy.tiers import TierTableError, load_table
from consumer.ports import Inputs, Planner, Renderer
from consumer.s3 import S3Connection
from consumer.settings import Settings, SettingsError
from consumer.storage import S3Store
from consumer.telemetry import set_up_logs
from schemas.events import Worker as WorkerData
from schemas.events import WorkerEvent

S3_PATIENCE_S = 10.0
"""Then it is an outage, and work in hand waits for its end (``consumer.patience``)."""

log = structlog.get_logger()


class EngineSet(Protocol):
    """The engines as the worker uses them; ``consumer.engine.engines.Engines`` is the real one."""

    @property
    def ready(self) -> bool:
        """Whether orders are welcome."""

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


async def run_worker(settings: Settings, *, grace_s: float, engines: EngineSet | None = None) -> Exit:
    """Run until told to stop; returns the exit code.

    Args:
        settings: all sections.
        grace_s: seconds that work in hand may take after the first signal.
        engines: other engines than the supervised processes; benchmarks give instant ones.
    """
    as_json = set_up_logs(settings.worker.log_level, settings.worker.log_format)
    try:
        table = load_table(settings.worker.tier_table)
        await Worker(settings, engines or Engines(settings, table, log_json=as_json), grace_s).run()
    except (SettingsError, TierTableError, BrokerRefused, ConsumerError) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        return Exit.USAGE
    except EngineUnusable as error:
        log.error("the engine cannot work", reason=str(error))  # noqa: TRY400 - as above
        return Exit.ENGINE
    return Exit.DONE


class Worker:
    """One worker: its parts, their start, and their end."""

    def __init__(self, settings: Settings, engines: EngineSet, grace_s: float) -> None:
        self._settings = settings
        self._engines = engines
        self._grace_s = grace_s
        self._id = settings.worker.worker_id or f"{socket.gethostname().split('.')[0]}-{os.getpid()}"
        self._began = time.perf_counter()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._store: S3Store | None = None
        self._patience = Patience(self._on_storage)
        self._links = {
            use: Link(settings.broker, f"acestep-consumer {self._id} {use}") for use in ("publish", "consume")
        }
        self._publisher = Publisher(self._links["publish"], self._id)
        self._consumer: Consumer | None = None

    async def run(self) -> None:
        """Start, work, stop."""
        with _signals(self._on_signal):
            async with AsyncExitStack() as stack:
                await self._start(stack)
                await self._work()

    async def _start(self, stack: AsyncExitStack) -> None:
        worker = self._settings.worker
        # Health first: an orchestrator must see a live process while gigabytes of weights load.
        pages = Health(self._checks(), self._metrics().render, worker.http_host, worker.http_port)
        health = await stack.enter_async_context(pages)
        log.info("starting", worker=self._id, health=f"http://{worker.http_host}:{health.port}/readyz")
        # The engines are the slowest and need nobody: they load while the rest connects.
        loading = asyncio.create_task(self._engines.start(), name="engines start")
        stack.push_async_callback(self._engines.stop)
        stack.callback(loading.cancel)
        # Storage before the broker: a message is taken only when its songs have a place.
        connection = S3Connection(self._settings.storage, patience_s=S3_PATIENCE_S)
        objects = Objects(await stack.enter_async_context(connection))
        self._store = store = S3Store(objects, self._settings.storage)
        await store.check()
        inputs = AllowedInputs(
            objects,
            self._settings.storage,
            self._settings.inputs,
            checkpoint_dir=self._settings.engine.checkpoint_dir,
        )
        await stack.enter_async_context(inputs)
        await stack.enter_async_context(self._links["publish"])
        log.info("broker and storage ready", after_s=round(time.perf_counter() - self._began, 2))
        if not await self._loaded(loading):
            return
        scratch = stack.enter_context(_scratch_root(self._settings.engine.scratch_dir))
        await stack.enter_async_context(self._links["consume"])
        # Consuming comes last: from here on messages are in hand.
        self._consumer = self._new_consumer(scratch, store, inputs)
        # What is alive now stays alive: the garbage collector need not look through it again and again.
        gc.collect()
        gc.freeze()
        await self._consumer.start()
        await self._announce("ready")
        self._tell()

    async def _loaded(self, loading: "asyncio.Task[None]") -> bool:
        """Wait for the engines, but not longer than until a signal."""
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            return False
        loading.result()
        return True

    def _new_consumer(self, scratch: Path, store: S3Store, inputs: Inputs) -> Consumer:
        settings = self._settings
        ports = Ports(
            store=PatientStore(store, self._patience),
            inputs=PatientInputs(inputs, self._patience),
            planner=self._engines.planner,
            renderer=self._engines.renderer,
            events=self._publisher,
        )
        rules = Rules(
            worker_id=self._id,
            scratch=scratch,
            limits=self._engines.limits,
            max_message_bytes=settings.broker.max_message_bytes,
            execution_timeout_s=settings.worker.execution_timeout_s,
        )
        return Consumer(self._links["consume"], settings.broker, Pipeline(ports, rules).process, self._publisher)

    async def _on_storage(self, away: bool) -> None:  # noqa: FBT001 - a callback's one argument
        """Take no messages whose songs have no place."""
        if self._consumer is not None:
            await (self._consumer.pause() if away else self._consumer.resume())

    async def _work(self) -> None:
        """Stay until a signal comes or the engine gives up, then drain."""
        if self._consumer is None:
            return
        stopping = asyncio.create_task(self._stop.wait())
        broken = asyncio.create_task(self._engines.wait_unusable())
        pacing = asyncio.create_task(self._pace(self._consumer), name="pacer")
        await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        pacing.cancel()
        # Work in hand cannot end without its engine: it goes back at once.
        await self._drain(self._consumer, 0 if broken.done() else self._grace_s)
        if broken.done():
            broken.result()
        broken.cancel()

    async def _pace(self, consumer: Consumer) -> None:
        """Let the prefetch follow what the card can do, where the operator leaves it to us."""
        broker = self._settings.broker
        if broker.queue_workers is None:
            policy = Concurrency(broker.workers_at_start, broker.queue_workers_max)
            await Pacer(consumer, self._engines.renderer_usage, policy, lambda: self._announce("ready")).run()

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
        )
        try:
            await self._publisher.announce(WorkerEvent.of(data))
        except Unpublished as error:
            log.warning("announcement dropped", state=state, reason=str(error))

    def _tell(self) -> None:
        workers = self._settings.broker.queue_workers
        for warning in self._engines.warnings():
            log.warning("engine", note=warning)
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
        return Metrics(WorkerCollector(lambda: self._consumer), RendererCollector(lambda: self._engines.renderer_usage))

    def _checks(self) -> dict[str, Check]:
        return {"broker": self._broker_up, "storage": self._storage_up, "models": self._models_up}

    async def _broker_up(self) -> bool:
        return all(link.is_up for link in self._links.values()) and self._consumer is not None

    async def _storage_up(self) -> bool:
        if self._store is None or self._patience.away:
            return False
        await self._store.ready()
        return True

    async def _models_up(self) -> bool:
        return self._engines.ready

    def _on_signal(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()


@contextmanager
def _signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call ``handler`` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextmanager
def _scratch_root(folder: Path | None) -> Iterator[Path]:
    """A folder of this worker's own for all its jobs, gone with it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="acestep-", dir=folder, ignore_cleanup_errors=True) as root:
        yield Path(root)
