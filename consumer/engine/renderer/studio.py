# SPDX-License-Identifier: Apache-2.0
"""The renderer's start: look at the device, load the models, open the lanes, and report what there is."""

from collections.abc import Callable
from dataclasses import dataclass

from consumer.audio import check_encoders
from consumer.engine.messages import RendererReport
from consumer.engine.renderer.checkpoint import load_models
from consumer.engine.renderer.device import DeviceReport, Offload, inspect, offload_for
from consumer.engine.renderer.lane import Lane
from consumer.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Studio:
    """What the renderer process works with: ``render`` takes one of the lanes, which serve one job at a time each."""

    report: RendererReport
    lanes: tuple[Lane, ...]


def open_studio(settings: EngineSettings, say: Callable[[str], None] = lambda _: None) -> Studio:
    """Load everything that the settings name.

    Raises:
        DeviceError: the device is not there.
        CheckpointError: a model is not found or cannot be loaded.
    """
    device = inspect(settings)
    say(f"device {device.device}: {device.name}, {device.vram_gb:.1f} GB")
    offload = offload_for(device, settings)
    handles = load_models(settings, device, say)
    count = _lanes(settings, offload)
    lanes = tuple(Lane(handles, device, offload) for _ in range(count))
    report = RendererReport(
        device=device.device,
        device_name=device.name,
        vram_gb=device.vram_gb,
        models=tuple(handle.model for handle in handles),
        formats=check_encoders(),
        lanes=count,
        offload=offload.models,
        warnings=_warnings(settings, device, offload),
    )
    return Studio(report, lanes)


def _lanes(settings: EngineSettings, offload: Offload) -> int:
    """One lane when offloading.

    A module is moved to the card by the lane that calls it and back to RAM by the lane that calls the next one: with
    two lanes, one would take the weights away under the other. Where memory is so short, two songs at a time would
    not fit either.
    """
    return 1 if offload.models else settings.lanes


def _warnings(settings: EngineSettings, device: DeviceReport, offload: Offload) -> tuple[str, ...]:
    found = []
    if offload.models and settings.lanes > 1:
        found.append(f"ACESTEP_API_WORKERS = {settings.lanes}: one lane is used, because models are offloaded to RAM")
    if settings.offload and not offload.models:
        found.append(f"ACESTEP_OFFLOAD_TO_CPU has no effect on {device.kind}: there is no other memory to free")
    return tuple(found)
