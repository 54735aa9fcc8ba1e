# SPDX-License-Identifier: Apache-2.0
"""The renderer's start: look at the device, load the models, try them, and report what there is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from acestep_consumer.audio.codec import check_decoder, check_encoders
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.messages import RendererReport
from acestep_consumer.engine.renderer.attention import fastest, name_of
from acestep_consumer.engine.renderer.checkpoint import ModelHandle, load_models
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.device import DeviceReport, Offload, inspect, offload_for
from acestep_consumer.engine.renderer.measure import budget_for, measure
from acestep_consumer.engine.renderer.model_runner import Acceleration, ModelRunner
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.vae_decode import TileDecoder
from acestep_consumer.policy.memory_budget import MemoryBudget, MemoryFootprint

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RendererRuntime:
    """What the renderer process works with."""

    report: RendererReport
    batcher: Scheduler
    footprint: MemoryFootprint
    settings: EngineSettings

    def share(self, memory_gb: float) -> None:
        """Work within so many GiB of the device from now on."""
        device = torch.device(self.report.device)
        self.batcher.errand(
            lambda: self.batcher.rebudget(budget_for(self.footprint, device, memory_gb, self.settings.pack_tokens))
        )


def open_studio(
    settings: EngineSettings, say: Say = lambda _: None, *, share_gb: float | None = None
) -> RendererRuntime:
    """Load everything that the settings name.

    Raises:
        DeviceError: the device is not there.
        CheckpointError: a model is not found or cannot be loaded.
    """
    report = inspect(settings)
    say(f"device {report.device}: {report.name}, {report.vram_gb:.1f} GB")
    offload = offload_for(report, settings)
    handles = load_models(settings, report, say)
    device = torch.device(report.device)
    speed = speed_of(report, settings, offload)
    attention = name_of(fastest(device.type, device.index, report.dtype))
    booths = {booth.parts.model.name: booth for booth in _booths(handles, device, offload, speed)}
    batcher = Scheduler(
        booths, device, MemoryBudget(max_tokens=settings.pack_tokens), wait_s=settings.pack_wait_ms / 1000
    )
    footprint = batcher.errand(lambda: measure(list(booths.values()), device, say))
    # A card of pretended size is used as if it had that size.
    share_gb = share_gb or settings.max_vram_gb
    batcher.errand(lambda: batcher.rebudget(budget_for(footprint, device, share_gb, settings.pack_tokens)))
    found = RendererReport(
        device=report.device,
        device_name=report.name,
        vram_gb=report.vram_gb,
        models=tuple(handle.model for handle in handles),
        formats=check_encoders(),
        offload=offload.models,
        attention=attention,
        compiled=speed.compiled,
        warnings=tuple(_warnings(settings, report, offload)),
    )
    return RendererRuntime(found, batcher, footprint, settings)


def speed_of(report: DeviceReport, settings: EngineSettings, offload: Offload) -> Acceleration:
    """Decide what is compiled and recorded: on CUDA devices, unless set otherwise."""
    wanted = report.kind == "cuda" if settings.compile is None else settings.compile
    # A recording is for weights at one place, and offloaded weights come to another each time.
    return Acceleration(compiled=wanted, graphed=wanted and report.kind == "cuda" and not offload.models)


def _booths(
    handles: Sequence[ModelHandle], device: torch.device, offload: Offload, speed: Acceleration
) -> Iterator[ModelRunner]:
    decoders: dict[int, TileDecoder] = {}
    card = ModuleSwapper(device)
    for handle in handles:
        vae = handle.pipeline.vae
        if id(vae) not in decoders:
            decoders[id(vae)] = TileDecoder(vae, compiled=speed.compiled)
        parts = Components(handle, device, decoders[id(vae)])
        if offload.models:
            parts.offload(card, keep_dit=not offload.dit)
        yield ModelRunner(parts, speed)


def _warnings(settings: EngineSettings, device: DeviceReport, offload: Offload) -> Iterator[str]:
    if settings.lanes > 1:
        yield (
            f"ACESTEP_API_WORKERS = {settings.lanes} has no effect: jobs in hand share one batch, which threads would "
            "only slow down; ACESTEP_QUEUE_WORKERS says how many are in hand"
        )
    if settings.offload and not offload.models:
        yield f"ACESTEP_OFFLOAD_TO_CPU has no effect on {device.kind}: there is no other memory to free"
    if why := check_decoder():
        yield f"no request with audio inputs can be done here: of a short tone, the decoder process says that {why}"
