# SPDX-License-Identifier: Apache-2.0
"""Who is on the card, and when."""

from typing import Any

import torch

from acestep_consumer.engine.renderer.offload import ModuleSwapper

CARD = torch.device("meta")


class Traveller(torch.nn.Module):
    """Writes down where it is sent, and stays on the CPU."""

    def __init__(self, name: str, diary: list[str]) -> None:
        super().__init__()
        self.name = name
        self.diary = diary

    def to(self, device: Any) -> "Traveller":  # type: ignore[override]  # the one form that is used
        self.diary.append(f"{self.name} to {torch.device(device).type}")
        return self

    def forward(self, number: int) -> int:
        self.diary.append(f"{self.name} works")
        return number + 1


def card_of(*modules: torch.nn.Module) -> ModuleSwapper:
    card = ModuleSwapper(CARD)
    for module in modules:
        card.adopt(module)
    return card


def test_a_module_that_two_models_share_is_adopted_once() -> None:
    diary: list[str] = []
    encoder = Traveller("encoder", diary)
    card = card_of(encoder, encoder)
    assert diary == ["encoder to cpu"]
    encoder(1)
    card.clear()
    assert diary == ["encoder to cpu", "encoder to meta", "encoder works", "encoder to cpu"]


def test_a_module_comes_when_it_is_called_and_leaves_when_another_is() -> None:
    diary: list[str] = []
    encoder, dit = Traveller("encoder", diary), Traveller("dit", diary)
    card = card_of(encoder, dit)
    assert diary == ["encoder to cpu", "dit to cpu"]
    diary.clear()
    assert (encoder(1), dit(2), dit(3)) == (2, 3, 4)
    card.clear()
    card.clear()
    assert diary == [
        "encoder to meta",
        "encoder works",
        "encoder to cpu",
        "dit to meta",
        "dit works",
        "dit works",
        "dit to cpu",
    ]


def test_a_module_can_be_brought_without_being_called() -> None:
    diary: list[str] = []
    tokenizer = Traveller("tokenizer", diary)
    card_of(tokenizer).admit(tokenizer)
    assert diary[-1] == "tokenizer to meta"


def test_diffusers_can_see_where_a_call_belongs() -> None:
    module = Traveller("dit", [])
    card_of(module)
    assert getattr(module, "_hf_hook").execution_device == CARD  # noqa: B009 - set by accelerate, unknown to the type


def test_a_module_that_was_not_adopted_stays_where_it_is_and_the_others_make_room_for_it() -> None:
    diary: list[str] = []
    encoder, dit = Traveller("encoder", diary), Traveller("dit", diary)
    card = card_of(encoder)
    encoder(1)
    card.admit(dit)
    card.clear()
    assert diary == ["encoder to cpu", "encoder to meta", "encoder works", "encoder to cpu"]
