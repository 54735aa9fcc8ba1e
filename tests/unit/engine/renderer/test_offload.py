# SPDX-License-Identifier: Apache-2.0
"""Which module is on the device, and when."""

from typing import Any

import torch

from acestep_consumer.engine.renderer.offload import ModuleSwapper

CARD = torch.device("meta")


class RecordingModule(torch.nn.Module):
    """Records its moves and calls, and stays on the CPU."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name = name
        self.calls = calls

    def to(self, device: Any) -> "RecordingModule":  # type: ignore[override]  # the one form that is used
        self.calls.append(f"{self.name} to {torch.device(device).type}")
        return self

    def forward(self, number: int) -> int:
        self.calls.append(f"{self.name} works")
        return number + 1


def swapper_of(*modules: torch.nn.Module) -> ModuleSwapper:
    swapper = ModuleSwapper(CARD)
    for module in modules:
        swapper.register(module)
    return swapper


def test_a_module_that_two_models_share_is_registered_once() -> None:
    calls: list[str] = []
    encoder = RecordingModule("encoder", calls)
    swapper = swapper_of(encoder, encoder)
    assert calls == ["encoder to cpu"]
    encoder(1)
    swapper.unload()
    assert calls == ["encoder to cpu", "encoder to meta", "encoder works", "encoder to cpu"]


def test_a_module_is_loaded_when_it_is_called_and_unloaded_when_another_is() -> None:
    calls: list[str] = []
    encoder, dit = RecordingModule("encoder", calls), RecordingModule("dit", calls)
    swapper = swapper_of(encoder, dit)
    assert calls == ["encoder to cpu", "dit to cpu"]
    calls.clear()
    assert (encoder(1), dit(2), dit(3)) == (2, 3, 4)
    swapper.unload()
    swapper.unload()
    assert calls == [
        "encoder to meta",
        "encoder works",
        "encoder to cpu",
        "dit to meta",
        "dit works",
        "dit works",
        "dit to cpu",
    ]


def test_a_module_can_be_brought_without_being_called() -> None:
    calls: list[str] = []
    tokenizer = RecordingModule("tokenizer", calls)
    swapper_of(tokenizer).load(tokenizer)
    assert calls[-1] == "tokenizer to meta"


def test_diffusers_can_see_where_a_call_belongs() -> None:
    module = RecordingModule("dit", [])
    swapper_of(module)
    assert getattr(module, "_hf_hook").execution_device == CARD  # noqa: B009 - set by accelerate, unknown to the type


def test_an_unregistered_module_stays_where_it_is_and_the_loaded_one_is_unloaded() -> None:
    calls: list[str] = []
    encoder, dit = RecordingModule("encoder", calls), RecordingModule("dit", calls)
    swapper = swapper_of(encoder)
    encoder(1)
    swapper.load(dit)
    swapper.unload()
    assert calls == ["encoder to cpu", "encoder to meta", "encoder works", "encoder to cpu"]
