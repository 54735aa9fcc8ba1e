# SPDX-License-Identifier: Apache-2.0
"""The choice of a device, and what is kept off it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer.device import DeviceError, DeviceReport, Offload, inspect, offload_for


def settings(device: str = "auto", **more: object) -> EngineSettings:
    return EngineSettings.model_validate({"device": device, **more})


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CUDA cards of 48 and 24 GiB."""
    cards = [SimpleNamespace(name="Big", total_memory=48 * 2**30), SimpleNamespace(name="Small", total_memory=24 << 30)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[device.index])


@pytest.fixture
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cards")
def test_without_a_card_the_cpu_renders_in_float32() -> None:
    found = inspect(settings())
    assert (found.device, found.vram_gb, found.dtype) == ("cpu", 0, torch.float32)


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize(
    ("asked", "device", "name", "gigabytes"),
    [("auto", "cuda:0", "Big", 48), ("cuda", "cuda:0", "Big", 48), ("cuda:1", "cuda:1", "Small", 24)],
)
def test_a_card_is_chosen_by_name_and_measured_in_gib(asked: str, device: str, name: str, gigabytes: float) -> None:
    found = inspect(settings(asked))
    assert (found.device, found.name, found.vram_gb, found.dtype) == (device, name, gigabytes, torch.bfloat16)


@pytest.mark.usefixtures("two_cards")
def test_the_cpu_can_be_asked_for_beside_a_card() -> None:
    assert inspect(settings("cpu")).device == "cpu"


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_a_pretended_size_replaces_the_found_one(asked: str) -> None:
    assert inspect(settings(asked, max_vram_gb=7.5)).vram_gb == 7.5


@pytest.mark.usefixtures("no_cards")
@pytest.mark.parametrize("asked", ["cuda", "cuda:1", "mps", "xpu", "gpu", "meta", "nonsense"])
def test_a_device_that_is_not_there_is_named(asked: str) -> None:
    with pytest.raises(DeviceError, match=f"ACESTEP_DEVICE = {asked}: "):
        inspect(settings(asked))


@pytest.mark.parametrize(
    ("device", "vram_gb", "given", "expected"),
    [
        ("cuda:0", 15.4, {}, Offload(models=True, dit=True)),
        ("cuda:0", 15.5, {}, Offload()),
        ("cuda:0", 8, {"offload": False}, Offload()),
        ("cuda:0", 80, {"offload": True}, Offload(models=True, dit=True)),
        ("cuda:0", 80, {"offload": True, "offload_dit": False}, Offload(models=True, dit=False)),
        ("cuda:0", 80, {"offload_dit": True}, Offload()),
        ("cpu", 0, {}, Offload()),
        ("cpu", 0, {"offload": True}, Offload()),
        ("mps", 8, {}, Offload()),
    ],
)
def test_small_cards_offload_unless_set_otherwise(
    device: str, vram_gb: float, given: dict[str, Any], expected: Offload
) -> None:
    report = DeviceReport(device=device, name="card", vram_gb=vram_gb)
    assert offload_for(report, settings(**given)) == expected
