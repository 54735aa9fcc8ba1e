# SPDX-License-Identifier: Apache-2.0
"""The engine processes of one worker: the renderer, and the planner where there is a language model."""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from acestep_consumer.config.settings import EngineSettings, LogLevel, Settings
from acestep_consumer.domain.ports import Planner, Renderer
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.engine.adapters import DirectPlanner, LmPlanner, PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.cuda_mps import MpsDaemon, MpsUnavailable, start_mps
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import Configure, ConfigurePlanner, DeviceFound, RendererReport, StartPhase
from acestep_consumer.engine.planner.registry import lm_request
from acestep_consumer.engine.process_memory import available_bytes
from acestep_consumer.engine.supervisor import EngineState, EngineUnusable
from acestep_consumer.engine.watchdog import SILENCE_S, WatchdogLimits
from acestep_consumer.policy.admit import Limits
from acestep_consumer.policy.benchmarks import RESERVE_GB
from acestep_consumer.policy.lm_choice import LmPlan, LmRequest, loads_beside, plan_lm, renderer_share
from acestep_consumer.policy.tiers import TierTable
from acestep_schemas.events import LmChoice

RAM_SHARE = 0.9
"""Share of all RAM that one engine process may hold, unless set: beyond that the kernel may kill it at any moment."""

_NVIDIA_DRIVER: Final = Path("/dev/nvidiactl")
_GIB = 2**30

log = structlog.get_logger()


class Engines:
    """Starts the renderer, and the planner where the settings and the device allow one."""

    def __init__(self, settings: Settings, table: TierTable, *, log_json: bool) -> None:
        self._settings = settings
        self._table = table
        self._log_level = settings.worker.log_level
        self._log_json = log_json
        self._watchdog_limits = watchdog_limits_of(settings.engine)
        self._renderer = RendererSupervisor(
            self._configure(), max_attempts=settings.worker.max_attempts, limits=self._watchdog_limits
        )
        self._planner: PlannerSupervisor | None = None
        self._mps: MpsDaemon | None = None
        self._lm_plan: LmPlan | None = None

    async def start(self) -> None:
        """Start the renderer, and beside it the language model that its device has memory for.

        The planner imports its packages from the first moment where an NVIDIA GPU may be there. On a card with plenty
        of memory it loads as soon as the renderer has found the device. On others it waits until the renderer has
        measured its memory: vLLM measures too, and takes what another process allocates at that time for its own.

        Raises:
            EngineUnusable: one cannot start, or was stopped.
        """
        request = lm_request(self._settings.engine, os.environ)
        await self._start_mps(request)
        ahead = self._planner_ahead(request)
        rendering = asyncio.create_task(self._renderer.start(), name="renderer start")
        try:
            device = await self._first_device(rendering)
            plan = plan_lm(request, self._table.tier_of(device.vram_gb), device.vram_gb)
            self._lm_plan = plan = self._with_room(plan, device)
            if plan is None:
                await rendering
            else:
                if plan.trade_off:
                    log.info("language model chosen", model=plan.model, trade_off=plan.trade_off)
                self._share_memory(plan, device)
                await self._start_both(rendering, plan, device, ahead)
        finally:
            rendering.cancel()
            if ahead is not None and self._planner is not ahead.planner:
                await ahead.stop()
            await asyncio.gather(rendering, return_exceptions=True)

    async def stop(self) -> None:
        """Stop both."""
        if self._planner is not None:
            await self._planner.stop()
        await self._renderer.stop()
        if self._mps is not None:
            await self._mps.stop()

    async def wait_unusable(self) -> None:
        """Wait until one cannot be started any more. Raises ``EngineUnusable`` then."""
        waiting = [asyncio.create_task(engine.wait_unusable()) for engine in self._supervisors()]
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
        """Whether jobs are accepted."""
        return all(engine.ready for engine in self._supervisors())

    @property
    def states(self) -> Mapping[str, EngineState]:
        """State of each engine process, by name."""
        return {engine.name: engine.state for engine in self._supervisors()}

    @property
    def start_seconds(self) -> Mapping[str, Mapping[StartPhase, float]]:
        """Seconds of each part of the last start of each engine process, by its name."""
        return {engine.name: engine.start_seconds for engine in self._supervisors()}

    @property
    def renderer(self) -> Renderer:
        """The port that renders songs."""
        return self._renderer

    @property
    def planner(self) -> Planner:
        """The port that plans songs."""
        return LmPlanner(self._planner, self._renderer) if self._planner else DirectPlanner(self._renderer)

    @property
    def report(self) -> RendererReport:
        """The renderer's device, models and formats. Only after ``start``."""
        if self._renderer.report is None:
            raise RuntimeError("the renderer has not started")
        return self._renderer.report

    @property
    def renderer_usage(self) -> DeviceUsage:
        """Usage of the renderer's device, over all its processes."""
        return self._renderer.usage

    def capacity(self) -> EngineCapacity:
        """Return what they can work on at once, as they have reported it."""
        report, stats = self._renderer.report, self._renderer.usage.stats
        songs = self._planner.report.songs if self._planner and self._planner.report else None
        lm = self._planner.usage.lm if self._planner else None
        if lm is not None and lm.waiting:  # its memory is full: one more, which is there when some of it is free
            songs = min(songs or lm.running + 1, lm.running + 1)
        return EngineCapacity(
            lm_songs=songs,
            lm_waiting=lm.waiting if lm else 0,
            pack_s=stats.pack_s if stats and stats.pack_s else None,
            encoders=report.encoders if report and report.encoders else None,
        )

    def limits(self) -> Limits:
        """Return the limits of requests to this worker now. Only after ``start``."""
        report = self.report
        return Limits(
            tier=self._table.tier_of(report.vram_gb),
            table_version=self._table.version,
            vram_gb=report.vram_gb,
            models=report.models,
            formats=frozenset(report.formats),
            lm=self._lm_choice(),
        )

    def set_log_level(self, level: LogLevel) -> None:
        """Set the minimum log level of both processes, and of those that replace them."""
        self._log_level = level
        for engine in self._supervisors():
            engine.set_log_level(level)

    def warnings(self) -> Iterator[str]:
        """Yield notes for the operator on this start."""
        yield from self.report.warnings
        if self._lm_plan is not None:
            yield from self._lm_plan.warnings
        if self._planner is not None and self._planner.report is not None:
            yield from self._planner.report.warnings

    async def _start_mps(self, request: LmRequest) -> None:
        """Start a daemon for two engines on one GPU. Raises ``EngineUnusable`` if it is required and does not work."""
        engine = self._settings.engine
        one_gpu = (
            engine.device.strip().lower().startswith(("auto", "cuda")) and engine.lm_device.strip().lower() != "cpu"
        )
        if engine.cuda_mps is False or request.init is False or not one_gpu:
            return
        try:
            self._mps = await start_mps(wanted=engine.cuda_mps)
        except MpsUnavailable as error:
            raise EngineUnusable(f"ACESTEP_CUDA_MPS=true: {error}") from error
        self._renderer.environment = self._mps.environment if self._mps else {}

    async def _first_device(self, rendering: asyncio.Task[RendererReport]) -> DeviceFound:
        """Return the renderer's device as soon as it is known. Raises ``EngineUnusable`` if the start fails before."""
        found: asyncio.Future[DeviceFound] = asyncio.get_running_loop().create_future()
        self._renderer.on_device = lambda device: None if found.done() else found.set_result(device)
        await asyncio.wait((rendering, found), return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            report = rendering.result()
            return DeviceFound(device=report.device, vram_gb=report.vram_gb)
        return found.result()

    def _with_room(self, plan: LmPlan | None, device: DeviceFound) -> LmPlan | None:
        """Return the plan if it leaves the renderer some memory, else none.

        Raises ``EngineUnusable`` for one that is required.
        """
        if plan is None or not self._is_shared(device) or renderer_share(plan, device.vram_gb):
            return plan
        reason = (
            f"{plan.model} leaves the renderer none of the {device.vram_gb:.3g} GB of {device.device}: "
            "set ACESTEP_LM_DEVICE=cpu, or ACESTEP_INIT_LLM=false to do without a language model"
        )
        if plan.required:
            raise EngineUnusable(reason)
        log.warning("no language model was loaded, requests that need one will fail", reason=reason)
        return None

    def _is_shared(self, device: DeviceFound) -> bool:
        """Whether both engines are on one GPU."""
        return bool(device.vram_gb) and self._lm_device(device) == device.device

    def _share_memory(self, plan: LmPlan, device: DeviceFound) -> None:
        """Set the renderer's memory share where both engines are on one GPU."""
        if self._is_shared(device):
            self._renderer.set_memory_share(renderer_share(plan, device.vram_gb))

    def _lm_device(self, renderer: DeviceFound) -> str:
        """Return the device of the language model, named as the renderer names its own."""
        wanted = self._settings.engine.lm_device.strip().lower()
        if wanted == "auto":
            return renderer.device
        return f"{wanted}:0" if wanted in ("cuda", "xpu") else wanted

    def _planner_ahead(self, request: LmRequest) -> "_StartingPlanner | None":
        """Start a planner process before the device is known, which takes as long as importing vLLM."""
        engine = self._settings.engine
        if request.init is False or engine.device.strip().lower() == "cpu" or not _NVIDIA_DRIVER.exists():
            return None
        configure = self._configure_planner(
            ConfigurePlanner(
                model=engine.lm_model_path or "",
                backend=engine.lm_backend,
                memory_gb=0,
                offload=bool(engine.lm_offload),
            )
        )
        return _StartingPlanner(self._new_planner(replace(configure, wait=True)))

    def _new_planner(self, configure: ConfigurePlanner) -> PlannerSupervisor:
        attempts = self._settings.worker.max_attempts
        planner = PlannerSupervisor(configure, max_attempts=attempts, limits=self._watchdog_limits)
        planner.environment = self._renderer.environment
        return planner

    async def _start_both(
        self,
        rendering: asyncio.Task[RendererReport],
        plan: LmPlan,
        device: DeviceFound,
        ahead: "_StartingPlanner | None",
    ) -> None:
        """Wait until both have started. Raises ``EngineUnusable`` as soon as one cannot."""
        configure = self._configured(plan, device)
        starting = ahead or _StartingPlanner(self._new_planner(configure))
        self._planner = planner = starting.planner
        planner.configure(configure)
        if not configure.wait:
            planner.load()

        async def follow_renderer() -> None:
            await rendering
            planner.renderer_is_up()

        planning = asyncio.create_task(self._wait_planner(starting, plan, device), name="planner start")
        try:
            await asyncio.gather(follow_renderer(), planning)
        finally:
            planning.cancel()
            await asyncio.gather(planning, return_exceptions=True)

    async def _wait_planner(self, starting: "_StartingPlanner", plan: LmPlan, device: DeviceFound) -> None:
        """Wait for it. If it cannot be started and need not be, go on without a language model."""
        try:
            await asyncio.wait((starting.task,))
            starting.task.result()
        except EngineUnusable as error:
            if plan.required:
                raise
            self._planner = None
            if device.vram_gb:
                self._renderer.set_memory_share(device.vram_gb - RESERVE_GB)
            log.warning("no language model was loaded, requests that need one will fail", reason=str(error))

    def _supervisors(self) -> Iterator[RendererSupervisor | PlannerSupervisor]:
        yield self._renderer
        if self._planner is not None:
            yield self._planner

    def _lm_choice(self) -> LmChoice | None:
        loaded = self._planner.report if self._planner else None
        return LmChoice(model=loaded.model, backend=loaded.backend) if loaded else None

    def _configure(self) -> Configure:
        return Configure(
            settings=self._settings.engine,
            max_input_s=self._settings.inputs.max_seconds,
            log_level=self._log_level,
            log_json=self._log_json,
        )

    def _configured(self, plan: LmPlan, device: DeviceFound) -> ConfigurePlanner:
        """Return the planner's settings on this device."""
        engine = self._settings.engine
        beside = loads_beside(plan, device.vram_gb, len(engine.models))
        return self._configure_planner(
            ConfigurePlanner(
                model=plan.model,
                backend=plan.backend,
                memory_gb=plan.memory_gb,
                device=self._lm_device(device),
                offload=bool(engine.lm_offload),
                beside=beside,
                wait=device.vram_gb > 0 and not beside,
            )
        )

    def _configure_planner(self, configure: ConfigurePlanner) -> ConfigurePlanner:
        """Add what depends on the settings alone."""
        engine = self._settings.engine
        return replace(
            configure,
            checkpoint_dir=engine.checkpoint_dir,
            quantization=engine.quantization,
            compile_cache=engine.compile_cache,
            log_level=self._log_level,
            log_json=self._log_json,
        )


class _StartingPlanner:
    """A planner whose process has been started."""

    def __init__(self, planner: PlannerSupervisor) -> None:
        self.planner = planner
        self.task = asyncio.create_task(planner.start(), name="planner process")
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whether anybody waits or not

    async def stop(self) -> None:
        """End it; nobody needs it."""
        self.task.cancel()
        await self.planner.stop()
        await asyncio.gather(self.task, return_exceptions=True)


def watchdog_limits_of(settings: EngineSettings) -> WatchdogLimits:
    """Return the limits beyond which an engine process is killed and replaced."""
    hang_s, silence_s = settings.hang_s, max(settings.hang_s, SILENCE_S)
    if settings.ram_gb is not None:
        ram, source = round(settings.ram_gb * _GIB), "ACESTEP_ENGINE_RAM_GB"
        return WatchdogLimits(hang_s=hang_s, silence_s=silence_s, ram_bytes=ram, ram_source=source)
    available = available_bytes()
    return WatchdogLimits(
        hang_s=hang_s,
        silence_s=silence_s,
        ram_bytes=None if available is None else round(RAM_SHARE * available),
        ram_source=f"ACESTEP_ENGINE_RAM_GB is unset: {RAM_SHARE:.0%} of all RAM",
    )
