# SPDX-License-Identifier: Apache-2.0
"""The renderer's start: inspect the device, load the models, warm them up, measure memory, and report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from acestep_consumer.audio.codec import Encode, check_decoder, check_encoders, encode
from acestep_consumer.audio.encoding import lame
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.compiler import compiler_fault
from acestep_consumer.engine.messages import RendererReport, StartPhase
from acestep_consumer.engine.renderer.checkpoints.checkpoint import ModelHandle, load_models
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.decoder.vae_decode import TileDecoder
from acestep_consumer.engine.renderer.denoising.attention import fastest_kernel, name_of, sdpa_per_sequence
from acestep_consumer.engine.renderer.device import DeviceReport, Offload, inspect, offload_for
from acestep_consumer.engine.renderer.measure import budget_for, measure
from acestep_consumer.engine.renderer.model_runner import Acceleration, ModelRunner
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.policy.benchmarks import RESERVE_GB
from acestep_consumer.policy.memory_budget import MemoryBudget, MemoryFootprint, StepGraphLimits

# The fused kernels' tilings are for these cards' copy engine and tensor cores, and faster there by measurement.
_HOPPER = (9, 0)

Notify = Callable[[str, StartPhase], None]
"""Gets a line for the log at each step of the start, and the phase that the step belongs to."""


@dataclass(frozen=True, slots=True)
class RendererRuntime:
    """The loaded renderer: its report, its scheduler, and the measured memory that batches take."""

    report: RendererReport
    scheduler: Scheduler
    footprint: MemoryFootprint
    settings: EngineSettings

    def set_memory_share(self, memory_gb: float) -> None:
        """Use at most so many GiB of the device from now on."""
        device, tokens = torch.device(self.report.device), self.settings.pack_tokens
        self.scheduler.run_on_device(
            lambda: self.scheduler.set_budget(budget_for(self.footprint, device, memory_gb, tokens))
        )


def open_runtime(
    settings: EngineSettings,
    notify: Notify = lambda *_: None,
    *,
    device_report: DeviceReport | None = None,
    share_gb: float | None = None,
    encode_test: Encode = encode,
) -> RendererRuntime:
    """Load every model that the settings name.

    ``device_report``: of the device to use; None: it is inspected here. ``share_gb``: GiB of it to use; None: all that
    is free. ``encode_test`` shows which formats can be encoded.

    Raises:
        DeviceError: the device is not there.
        CheckpointError: a model is not found or cannot be loaded.
    """
    report = device_report or inspect(settings)
    notify(f"device {report.device}: {report.name}, {report.vram_gb:.1f} GB", "models")
    offload = offload_for(report, settings)
    handles = load_models(settings, report, lambda step: notify(step, "models"))
    device = torch.device(report.device)
    fault = compiler_fault(report.kind) if is_compiled(report, settings) else None
    acceleration = acceleration_for(report, settings, offload) if fault is None else Acceleration()
    attention = name_of(fastest_kernel(device.type, device.index, report.dtype))
    runners = {runner.parts.model.name: runner for runner in _runners(handles, device, offload, acceleration)}
    scheduler = Scheduler(
        runners, device, MemoryBudget(max_tokens=settings.pack_tokens), wait_s=settings.pack_wait_ms / 1000
    )
    footprint = scheduler.run_on_device(
        lambda: measure(list(runners.values()), device, lambda step: notify(step, "warm-up"))
    )
    if share_gb is None:
        share_gb = share_of(settings.max_vram_gb)
    scheduler.run_on_device(lambda: scheduler.set_budget(budget_for(footprint, device, share_gb, settings.pack_tokens)))
    found = RendererReport(
        device=report.device,
        device_name=report.name,
        vram_gb=report.vram_gb,
        models=tuple(handle.model for handle in handles),
        formats=check_encoders(encode_test),
        offload=offload.models,
        attention=attention,
        compiled=acceleration.compiled,
        warnings=tuple(_warnings(settings, report, offload, fault)),
    )
    return RendererRuntime(found, scheduler, footprint, settings)


def share_of(max_vram_gb: float | None) -> float | None:
    """Return the renderer's share of a device that is used as if it had so much memory, and that it has to itself."""
    return None if max_vram_gb is None else max(max_vram_gb - RESERVE_GB, max_vram_gb / 2)


def is_compiled(report: DeviceReport, settings: EngineSettings) -> bool:
    """Whether the models are to be compiled: as set, or by default on CUDA devices."""
    return report.kind == "cuda" if settings.compile is None else settings.compile


def acceleration_for(report: DeviceReport, settings: EngineSettings, offload: Offload) -> Acceleration:
    """Decide on ``torch.compile``, CUDA graphs and fused kernels: on CUDA devices, unless set otherwise."""
    wanted = is_compiled(report, settings)
    cuda = wanted and report.kind == "cuda"
    return Acceleration(
        compiled=wanted,
        graphs=StepGraphLimits.on_a_device_with(report.vram_gb) if cuda and _is_capturable(report, offload) else None,
        fused=cuda and _is_hopper(report.device),
    )


def _is_capturable(report: DeviceReport, offload: Offload) -> bool:
    """Whether a step can become a CUDA graph.

    Offloaded weights come to another address each time. torch's ordinary attention, which older cards and AMD's use,
    has to know the lengths on the host: a graph that is captured may not wait for the device.
    """
    device = torch.device(report.device)
    return not offload.models and fastest_kernel(device.type, device.index, report.dtype) is not sdpa_per_sequence


def _is_hopper(device: str) -> bool:
    """Whether the fused kernels are for this card. AMD's numbers are others: its MI200 is a 9.0 too."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == _HOPPER


def _runners(
    handles: Sequence[ModelHandle], device: torch.device, offload: Offload, acceleration: Acceleration
) -> Iterator[ModelRunner]:
    decoders: dict[int, TileDecoder] = {}
    swapper = ModuleSwapper(device)
    for handle in handles:
        vae = handle.pipeline.vae
        if id(vae) not in decoders:
            decoders[id(vae)] = TileDecoder(vae, compiled=acceleration.compiled, fused=acceleration.fused)
        parts = Components(handle, device, decoders[id(vae)])
        if offload.models:
            parts.offload(swapper, keep_dit=not offload.dit)
        yield ModelRunner(parts, acceleration)


def _warnings(settings: EngineSettings, device: DeviceReport, offload: Offload, fault: str | None) -> Iterator[str]:
    if fault is not None:
        yield f"the models run uncompiled, which is slower, because {fault}. ACESTEP_COMPILE=false silences this"
    if settings.lanes > 1:
        yield (
            f"ACESTEP_API_WORKERS = {settings.lanes} has no effect: concurrent jobs share one batch, and threads would "
            "only slow it down; ACESTEP_QUEUE_WORKERS sets the number of concurrent jobs"
        )
    if settings.offload and not offload.models:
        yield f"ACESTEP_OFFLOAD_TO_CPU has no effect on {device.kind}: it has no separate memory to free"
    if lame.library() is None:
        yield "MP3 files take four times as long to encode, because lameenc is missing: pip install lameenc"
    if why := check_decoder():
        yield f"requests with audio inputs will fail: decoding a test tone failed, {why}"
