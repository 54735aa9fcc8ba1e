# SPDX-License-Identifier: Apache-2.0
"""Which module is on the device, and when; and what its weights are there and in RAM."""

import copy
from typing import Any

import pytest
import torch

from acestep_consumer.engine.renderer import offload
from acestep_consumer.engine.renderer.offload import ModuleSwapper

DEVICE = torch.device("cpu")


class RecordingModule(torch.nn.Module):
    """Records its calls."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name = name
        self.calls = calls

    def forward(self, number: int) -> int:
        self.calls.append(f"{self.name} works")
        return number + 1


class RecordingCopy:
    """Records when its module is loaded and unloaded."""

    def __init__(self, module: Any, device: torch.device) -> None:
        assert device == DEVICE
        self.module = module
        module.calls.append(f"{module.name} to RAM")

    def load(self) -> None:
        self.module.calls.append(f"{self.module.name} loaded")

    def unload(self) -> None:
        self.module.calls.append(f"{self.module.name} unloaded")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(offload, "_HostCopy", RecordingCopy)
    return []


def swapper_of(*modules: torch.nn.Module) -> ModuleSwapper:
    swapper = ModuleSwapper(DEVICE)
    for module in modules:
        swapper.register(module)
    return swapper


def test_a_module_that_two_models_share_is_registered_once(calls: list[str]) -> None:
    encoder = RecordingModule("encoder", calls)
    swapper = swapper_of(encoder, encoder)
    assert calls == ["encoder to RAM"]
    encoder(1)
    swapper.unload()
    assert calls == ["encoder to RAM", "encoder loaded", "encoder works", "encoder unloaded"]


def test_a_module_is_loaded_when_it_is_called_and_unloaded_when_another_is(calls: list[str]) -> None:
    encoder, dit = RecordingModule("encoder", calls), RecordingModule("dit", calls)
    swapper = swapper_of(encoder, dit)
    assert calls == ["encoder to RAM", "dit to RAM"]
    calls.clear()
    assert (encoder(1), dit(2), dit(3)) == (2, 3, 4)
    swapper.unload()
    swapper.unload()
    assert calls == [
        "encoder loaded",
        "encoder works",
        "encoder unloaded",
        "dit loaded",
        "dit works",
        "dit works",
        "dit unloaded",
    ]


def test_a_module_can_be_brought_without_being_called(calls: list[str]) -> None:
    tokenizer = RecordingModule("tokenizer", calls)
    swapper_of(tokenizer).load(tokenizer)
    assert calls[-1] == "tokenizer loaded"


def test_diffusers_can_see_where_a_call_belongs(calls: list[str]) -> None:
    module = RecordingModule("dit", calls)
    swapper_of(module)
    assert getattr(module, "_hf_hook").execution_device == DEVICE  # noqa: B009 - set by accelerate, unknown to the type


def test_an_unregistered_module_stays_where_it_is_and_the_loaded_one_is_unloaded(calls: list[str]) -> None:
    encoder, dit = RecordingModule("encoder", calls), RecordingModule("dit", calls)
    swapper = swapper_of(encoder)
    encoder(1)
    swapper.load(dit)
    swapper.unload()
    assert calls == ["encoder to RAM", "encoder loaded", "encoder works", "encoder unloaded"]


def test_weights_of_any_kind_are_the_same_in_ram_and_on_the_device() -> None:
    convolution = torch.nn.Conv1d(3, 5, 7)
    module = torch.nn.Sequential(convolution, torch.nn.LayerNorm(11), torch.nn.Linear(4, 2).half())
    module.register_buffer("scalar", torch.tensor(2.5))
    module.register_buffer("counts", torch.arange(3))
    module.register_buffer("empty", torch.zeros(0, 4))
    convolution.weight.data = convolution.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    kept = dict(module.named_parameters())
    swapper = swapper_of(module)
    in_ram = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    for _ in range(2):
        swapper.load(module)
        assert_equal(module.state_dict(), before)
        swapper.unload()
        assert_equal(module.state_dict(), before)
        assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == in_ram
    # A compiled model refers to its parameters: they are the same objects.
    assert all(kept[name] is weight for name, weight in module.named_parameters())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_channels_that_are_innermost_stay_so() -> None:
    """The VAE decoder's are: its convolutions take longer with any other layout."""
    innermost = torch.nn.Conv2d(4, 6, (1, 7))
    innermost.weight.data = innermost.weight.data.contiguous(memory_format=torch.channels_last)
    spread = torch.nn.Linear(3, 5)
    spread.weight.data = torch.randn(5, 1).expand(5, 3)  # of one column in memory
    before = innermost.weight.clone(), spread.weight.clone()
    swapper = swapper_of(innermost, spread)
    for _ in range(2):
        swapper.load(innermost)
        assert innermost.weight.stride() == before[0].stride()
        assert torch.equal(innermost.weight, before[0])
        swapper.load(spread)
        assert torch.equal(spread.weight, before[1])


def test_what_came_to_the_device_before_its_memory_ran_out_leaves_it(calls: list[str]) -> None:
    encoder, dit = RecordingModule("encoder", calls), RecordingModule("dit", calls)
    swapper_of(encoder, dit)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RecordingCopy, "load", run_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            dit(1)
    assert calls[-1] == "dit unloaded"
    calls.clear()
    assert (encoder(1), dit(1)) == (2, 2)
    assert calls == ["encoder loaded", "encoder works", "encoder unloaded", "dit loaded", "dit works"]


def run_out_of_memory(_: RecordingCopy) -> None:
    raise torch.OutOfMemoryError


def test_views_of_one_module_have_one_copy_of_its_weights() -> None:
    """Each model has a view of the VAE that they share."""
    shared = torch.nn.Sequential(torch.nn.Linear(3, 5))
    one, other = copy.copy(shared), copy.copy(shared)
    swapper = swapper_of(one, other)
    assert swapper._registered[0][1] is swapper._registered[1][1]
    given = torch.randn(2, 3)
    first = one(given)
    loaded = swapper._loaded
    assert torch.equal(other(given), first)
    assert swapper._loaded is loaded is not None
    assert hasattr(other, "_hf_hook")
