# SPDX-License-Identifier: Apache-2.0
"""The engine processes of one worker: the renderer, and the planner where there is a language model."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress

import structlog

from acestep_consumer.config.settings import EngineSettings, Settings
from acestep_consumer.domain.ports import Planner, Renderer
from acestep_consumer.engine.adapters import LmPlanner, PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import Configure, ConfigurePlanner, RendererReport
from acestep_consumer.engine.planner.direct import DirectPlanner
from acestep_consumer.engine.process_memory import available_bytes
from acestep_consumer.engine.supervisor import EngineState, EngineUnusable
from acestep_consumer.engine.watchdog import WatchdogLimits
from acestep_consumer.policy.admit import Limits
from acestep_consumer.policy.lm_choice import RESERVE_GB, LmPlan, LmRequest, plan_lm, renderer_share
from acestep_consumer.policy.tiers import TierTable
from acestep_schemas.events import LmChoice

RAM_SHARE = 0.9
"""Of what there is, unless set: one process that holds more is on its way to be killed by the system at any moment."""

_GIB = 2**30

log = structlog.get_logger()


class Engines:
    """Starts what the settings and the card ask for, and says what this worker can do."""

    def __init__(self, settings: Settings, table: TierTable, *, log_json: bool) -> None:
        self._settings = settings
        self._table = table
        self._log_json = log_json
        self._bounds = bounds_of(settings.engine)
        self._renderer = RendererSupervisor(
            self._configure(), max_attempts=settings.worker.max_attempts, bounds=self._bounds
        )
        self._planner: PlannerSupervisor | None = None
        self._lm_plan: LmPlan | None = None

    async def start(self) -> None:
        """Bring the renderer up, then the language model that its card has room for. Raises ``EngineUnusable``."""
        report = await self._renderer.start()
        wanted = self._wish()
        self._lm_plan = plan_lm(wanted, self._table.tier_of(report.vram_gb), report.vram_gb)
        if self._lm_plan is not None:
            self._share_card(self._lm_plan, report)
            await self._start_planner(self._lm_plan, report)

    async def stop(self) -> None:
        """End both."""
        if self._planner is not None:
            await self._planner.stop()
        await self._renderer.stop()

    async def wait_unusable(self) -> None:
        """Wait until one of them gives up for good. Raises ``EngineUnusable`` then."""
        waiting = [asyncio.create_task(engine.wait_unusable()) for engine in self._running()]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                if task.done():
                    task.result()
        finally:
            for task in waiting:
                task.cancel()
                with suppress(asyncio.CancelledError, EngineUnusable):
                    await task

    @property
    def ready(self) -> bool:
        """Whether orders are welcome."""
        return all(engine.ready for engine in self._running())

    @property
    def states(self) -> Mapping[str, EngineState]:
        """Of each engine, by name, whether it takes orders and how often its process was replaced."""
        return {engine.name: engine.state for engine in self._running()}

    @property
    def renderer(self) -> Renderer:
        """Makes the songs."""
        return self._renderer

    @property
    def planner(self) -> Planner:
        """Fills in what requests leave open."""
        return LmPlanner(self._planner, self._renderer) if self._planner else DirectPlanner()

    @property
    def report(self) -> RendererReport:
        """What the renderer found. Only after ``start``."""
        assert self._renderer.report is not None  # noqa: S101 - the docstring's condition
        return self._renderer.report

    @property
    def renderer_usage(self) -> DeviceUsage:
        """How the renderer's device is used, over all its processes."""
        return self._renderer.usage

    def limits(self) -> Limits:
        """What may be asked of this worker now. Only after ``start``."""
        report = self.report
        return Limits(
            tier=self._table.tier_of(report.vram_gb),
            table_version=self._table.version,
            vram_gb=report.vram_gb,
            models=report.models,
            formats=frozenset(report.formats),
            lm=self._lm(),
        )

    def warnings(self) -> Iterator[str]:
        """What the operator should know about this start."""
        yield from self.report.warnings
        if self._lm_plan is not None:
            yield from self._lm_plan.warnings
        if self._planner is not None and self._planner.report is not None:
            yield from self._planner.report.warnings

    def _share_card(self, plan: LmPlan, report: RendererReport) -> None:
        """Agree on who may use how much, where both are on one card."""
        if report.vram_gb and self._settings.engine.lm_device in ("auto", report.device):
            self._renderer.allot(renderer_share(plan, report.vram_gb))

    async def _start_planner(self, plan: LmPlan, report: RendererReport) -> None:
        attempts = self._settings.worker.max_attempts
        configure = self._configure_planner(plan, report)
        planner = PlannerSupervisor(configure, max_attempts=attempts, bounds=self._bounds)
        self._planner = planner
        try:
            await planner.start()
        except EngineUnusable as error:
            if plan.required:
                raise
            self._planner = None
            if report.vram_gb:
                self._renderer.allot(report.vram_gb - RESERVE_GB)
            log.warning("no language model: requests that need it will fail", reason=str(error))

    def _running(self) -> Iterator[RendererSupervisor | PlannerSupervisor]:
        yield self._renderer
        if self._planner is not None:
            yield self._planner

    def _lm(self) -> LmChoice | None:
        loaded = self._planner.report if self._planner else None
        return LmChoice(model=loaded.model, backend=loaded.backend) if loaded else None

    def _wish(self) -> LmRequest:
        engine = self._settings.engine
        return LmRequest(init=engine.init_llm, model=engine.lm_model_path, backend=engine.lm_backend)

    def _configure(self) -> Configure:
        return Configure(
            settings=self._settings.engine,
            max_input_s=self._settings.inputs.max_seconds,
            log_level=self._settings.worker.log_level,
            log_json=self._log_json,
        )

    def _configure_planner(self, plan: LmPlan, report: RendererReport) -> ConfigurePlanner:
        engine = self._settings.engine
        return ConfigurePlanner(
            model=plan.model,
            backend=plan.backend,
            memory_gb=plan.memory_gb,
            device=report.device if engine.lm_device == "auto" else engine.lm_device,
            checkpoint_dir=engine.checkpoint_dir,
            offload=bool(engine.lm_offload),
            log_level=self._settings.worker.log_level,
            log_json=self._log_json,
        )


def bounds_of(settings: EngineSettings) -> WatchdogLimits:
    """Return what an engine process may take before it is replaced."""
    if settings.ram_gb is not None:
        ram, why = round(settings.ram_gb * _GIB), "ACESTEP_ENGINE_RAM_GB"
        return WatchdogLimits(hang_s=settings.hang_s, ram_bytes=ram, ram_why=why)
    available = available_bytes()
    return WatchdogLimits(
        hang_s=settings.hang_s,
        ram_bytes=None if available is None else round(RAM_SHARE * available),
        ram_why=f"ACESTEP_ENGINE_RAM_GB is unset: {RAM_SHARE:.0%} of what there is",
    )
