# SPDX-License-Identifier: Apache-2.0
"""Which language model a card gets."""

import pytest

from acestep_consumer.policy.lm_choice import LmPlan, LmRequest, plan_lm, renderer_share
from acestep_consumer.policy.tiers import BUILT_IN


def plan(vram_gb: float, **wish: object) -> LmPlan | None:
    return plan_lm(LmRequest(**wish), BUILT_IN.tier_of(vram_gb), vram_gb)  # type: ignore[arg-type]  # a table of wishes


@pytest.mark.parametrize(
    ("vram_gb", "model"),
    [
        (0, None),
        (12, None),
        (13, "acestep-5Hz-lm-0.6B"),
        (15, "acestep-5Hz-lm-1.7B"),
        (15.8, "acestep-5Hz-lm-0.6B"),
        (16, "acestep-5Hz-lm-1.7B"),
        (19, "acestep-5Hz-lm-1.7B"),
        (20, "acestep-5Hz-lm-4B"),
        (24, "acestep-5Hz-lm-4B"),
        (140, "acestep-5Hz-lm-4B"),
    ],
)
def test_left_alone_it_is_the_tiers_largest_that_leaves_the_renderer_room(vram_gb: float, model: str | None) -> None:
    chosen = plan(vram_gb)
    assert (chosen.model if chosen else None) == model


def test_what_the_model_leaves_is_the_renderers() -> None:
    chosen = plan(24)
    assert chosen is not None
    assert renderer_share(chosen, 24) == 24 - 12 - 1
    assert renderer_share(chosen, 8) == 0


def test_it_can_be_forbidden_and_insisted_on() -> None:
    assert plan(140, init=False) is None
    chosen = plan(8, init=True)
    assert chosen is not None
    assert (chosen.model, chosen.required) == ("acestep-5Hz-lm-0.6B", True)


def test_a_machine_without_a_card_gets_the_smallest_when_it_insists() -> None:
    chosen = plan(0, init=True)
    assert chosen is not None
    assert chosen.model == "acestep-5Hz-lm-0.6B"


def test_a_model_larger_than_the_tier_lists_falls_back_to_the_largest_and_says_so() -> None:
    chosen = plan(15, model="ACE-Step/acestep-5Hz-lm-4B")
    assert chosen is not None
    assert chosen.model == "acestep-5Hz-lm-1.7B"
    assert "too large for tier5" in chosen.warnings[0]


def test_a_smaller_model_or_one_of_the_operators_own_is_taken_as_it_is() -> None:
    for model in ("acestep-5Hz-lm-0.6B", "/models/my-finetune"):
        chosen = plan(24, model=model)
        assert chosen is not None
        assert (chosen.model, chosen.warnings) == (model, ())


def test_small_cards_give_the_known_memory_and_large_ones_a_share_for_sequences_in_flight() -> None:
    small, large = plan(24, model="acestep-5Hz-lm-1.7B"), plan(124, model="acestep-5Hz-lm-1.7B")
    assert small is not None
    assert large is not None
    assert (small.memory_gb, large.memory_gb) == (8, 48)
