# SPDX-License-Identifier: Apache-2.0
"""The composition root: what is started in which order, and why; and the same backwards.

Everything that can refuse to start does so before the first message is taken.
"""

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import structlog

from consumer.broker.connection import Link
from consumer.broker.consumer import Consumer
from consumer.broker.faults import BrokerRefused
from consumer.broker.publisher import Publisher
from consumer.engine.messages import Configure, RendererReport
from consumer.engine.planner.direct import DirectPlanner
from consumer.engine.rendering import RendererSupervisor
from consumer.engine.supervisor import EngineUnusable
from consumer.errors import ConsumerError, Unpublished
from consumer.health import Check, Health
from consumer.inputs import AllowedInputs
from consumer.objects import Objects
from consumer.pipeline import Pipeline, Ports, Rules
from consumer.policy.admit import Limits
from consumer.policy.tiers import TierTable, TierTableError, load_table
from consumer.ports import Inputs, Renderer
from consumer.s3 import S3Connection
from consumer.settings import Settings, SettingsError
from consumer.storage import S3Store
from consumer.telemetry import set_up_logs
from schemas.events import Worker as WorkerData
from schemas.events import WorkerEvent

EXIT_DONE, EXIT_SETTINGS, EXIT_ENGINE = 0, 2, 5

log = structlog.get_logger()


class Engine(Renderer, Protocol):
    """A renderer with a life: what the worker starts and stops."""

    @property
    def ready(self) -> bool:
        """Whether orders are welcome."""

    @property
    def report(self) -> RendererReport | None:
        """What it found and loaded, once it is up."""

    async def start(self) -> RendererReport:
        """Bring it up. Raises ``EngineUnusable``."""

    async def stop(self) -> None:
        """End it."""

    async def wait_unusable(self) -> None:
        """Wait until it gives up for good. Raises ``EngineUnusable`` then."""


async def run_worker(settings: Settings, *, grace_s: float, engine: Engine | None = None) -> int:
    """Run until told to stop; returns the exit code.

    Args:
        settings: all sections.
        grace_s: seconds that work in hand may take after the first signal.
        engine: another renderer than the supervised process; benchmarks give an instant one.
    """
    as_json = set_up_logs(settings.worker.log_level, settings.worker.log_format)
    try:
        _check_planner(settings)
        table = load_table(settings.worker.tier_table)
        await Worker(settings, table, engine or _supervisor(settings, as_json=as_json), grace_s).run()
    except (SettingsError, TierTableError, BrokerRefused, ConsumerError) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        return EXIT_SETTINGS
    except EngineUnusable as error:
        log.error("the engine cannot work", reason=str(error))  # noqa: TRY400 - as above
        return EXIT_ENGINE
    return EXIT_DONE


def _check_planner(settings: Settings) -> None:
    """Refuse what would be a promise: every request that thinks would fail."""
    if settings.engine.init_llm:
        raise SettingsError("ACESTEP_INIT_LLM=true: this version has no 5Hz language model; unset it, or set false")


def _supervisor(settings: Settings, *, as_json: bool) -> RendererSupervisor:
    configure = Configure(
        settings=settings.engine,
        max_input_s=settings.inputs.max_seconds,
        log_level=settings.worker.log_level,
        log_json=as_json,
    )
    return RendererSupervisor(configure, max_attempts=settings.worker.max_attempts)


class Worker:
    """One worker: its parts, their start, and their end."""

    def __init__(self, settings: Settings, table: TierTable, engine: Engine, grace_s: float) -> None:
        self._settings = settings
        self._table = table
        self._engine = engine
        self._grace_s = grace_s
        self._id = settings.worker.worker_id or f"{socket.gethostname().split('.')[0]}-{os.getpid()}"
        self._began = time.perf_counter()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._store: S3Store | None = None
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
        health = await stack.enter_async_context(Health(self._checks(), worker.http_host, worker.http_port))
        log.info("starting", worker=self._id, health=f"http://{worker.http_host}:{health.port}/readyz")
        # The engine is the slowest and needs nobody: it loads while the rest connects.
        loading = asyncio.create_task(self._engine.start(), name="engine start")
        stack.push_async_callback(self._engine.stop)
        stack.callback(loading.cancel)
        # Storage before the broker: a message is taken only when its songs have a place.
        objects = Objects(await stack.enter_async_context(S3Connection(self._settings.storage)))
        self._store = store = S3Store(objects, self._settings.storage)
        await store.check()
        inputs = AllowedInputs(objects, self._settings.storage, self._settings.inputs)
        await stack.enter_async_context(inputs)
        await stack.enter_async_context(self._links["publish"])
        log.info("broker and storage ready", after_s=round(time.perf_counter() - self._began, 2))
        report = await self._unless_stopped(loading)
        if report is None:
            return
        scratch = stack.enter_context(_scratch_root(self._settings.engine.scratch_dir))
        await stack.enter_async_context(self._links["consume"])
        # Consuming comes last: from here on messages are in hand.
        self._consumer = self._new_consumer(report, scratch, store, inputs)
        await self._consumer.start()
        await self._announce("ready")
        self._tell(report)

    async def _unless_stopped(self, loading: "asyncio.Task[RendererReport]") -> RendererReport | None:
        """Wait for the engine, but not longer than until a signal."""
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            return None
        return loading.result()

    def _new_consumer(self, report: RendererReport, scratch: Path, store: S3Store, inputs: Inputs) -> Consumer:
        settings = self._settings
        ports = Ports(
            store=store,
            inputs=inputs,
            planner=DirectPlanner(),
            renderer=self._engine,
            events=self._publisher,
        )
        rules = Rules(
            worker_id=self._id,
            scratch=scratch,
            limits=lambda: self._limits(self._engine.report or report),
            max_message_bytes=settings.broker.max_message_bytes,
            execution_timeout_s=settings.worker.execution_timeout_s,
        )
        return Consumer(self._links["consume"], settings.broker, Pipeline(ports, rules).process, self._publisher)

    def _limits(self, report: RendererReport) -> Limits:
        return Limits(
            tier=self._table.tier_of(report.vram_gb),
            table_version=self._table.version,
            vram_gb=report.vram_gb,
            models=report.models,
            formats=frozenset(report.formats),
        )

    async def _work(self) -> None:
        """Stay until a signal comes or the engine gives up, then drain."""
        if self._consumer is None:
            return
        stopping = asyncio.create_task(self._stop.wait())
        broken = asyncio.create_task(self._engine.wait_unusable())
        await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await self._drain(self._consumer)
        if broken.done():
            broken.result()
        broken.cancel()

    async def _drain(self, consumer: Consumer) -> None:
        log.info("draining", in_hand=consumer.in_hand, grace_s=self._grace_s)
        await self._announce("draining")
        draining = asyncio.create_task(consumer.drain(self._grace_s))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done():
            log.warning("leaving at once", handed_back=consumer.in_hand)
            draining.cancel()
            await consumer.drain(0)
        await self._announce("stopped")

    async def _announce(self, state: Literal["ready", "draining", "stopped"]) -> None:
        report = self._engine.report
        if report is None:
            return
        data = WorkerData(
            worker_id=self._id,
            state=state,
            prefetch=self._settings.broker.queue_workers,
            models=tuple(model.name for model in report.models),
            tier=self._limits(report).tier.name,
            vram_gb=report.vram_gb,
        )
        try:
            await self._publisher.announce(WorkerEvent.of(data))
        except Unpublished as error:
            log.warning("announcement dropped", state=state, reason=str(error))

    def _tell(self, report: RendererReport) -> None:
        workers, lanes = self._settings.broker.queue_workers, self._settings.engine.lanes
        if workers != lanes:
            log.warning(
                "ACESTEP_QUEUE_WORKERS and ACESTEP_API_WORKERS differ: jobs in hand wait for a render lane, or lanes "
                "stay idle; the same number for both is easier to read",
                queue_workers=workers,
                api_workers=lanes,
            )
        for warning in report.warnings:
            log.warning("engine", note=warning)
        log.info(
            "ready",
            worker=self._id,
            device=report.device_name,
            vram_gb=round(report.vram_gb, 1),
            tier=self._limits(report).tier.name,
            models=[model.name for model in report.models],
            prefetch=workers,
            after_s=round(time.perf_counter() - self._began, 2),
        )

    def _checks(self) -> dict[str, Check]:
        return {"broker": self._broker_up, "storage": self._storage_up, "models": self._models_up}

    async def _broker_up(self) -> bool:
        return all(link.is_up for link in self._links.values()) and self._consumer is not None

    async def _storage_up(self) -> bool:
        if self._store is None:
            return False
        await self._store.ready()
        return True

    async def _models_up(self) -> bool:
        return self._engine.ready

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
