# SPDX-License-Identifier: Apache-2.0
"""Which language model a card gets."""

from dataclasses import replace

import pytest

from acestep_consumer.policy.benchmarks import GIB, LM_SIZES, RESERVE_GB, LmSize
from acestep_consumer.policy.lm_choice import (
    INT8_FREES_GB,
    OFFLOADED_RENDERER_GB,
    LmPlan,
    LmRequest,
    plan_lm,
    renderer_share,
)
from acestep_consumer.policy.tiers import BUILT_IN, LM_MEMORY_GB, LMS


def plan(vram_gb: float, **wish: object) -> LmPlan | None:
    return plan_lm(LmRequest(**wish), BUILT_IN.tier_of(vram_gb), vram_gb)  # type: ignore[arg-type]  # a table of wishes


@pytest.mark.parametrize(
    ("vram_gb", "model"),
    [
        (0, None),
        (12, None),
        (12.9, "acestep-5Hz-lm-0.6B"),
        (13, "acestep-5Hz-lm-1.7B"),
        (15, "acestep-5Hz-lm-1.7B"),
        (15.8, "acestep-5Hz-lm-0.6B"),
        (16, "acestep-5Hz-lm-1.7B"),
        (19, "acestep-5Hz-lm-1.7B"),
        (20, "acestep-5Hz-lm-1.7B"),
        (24, "acestep-5Hz-lm-1.7B"),  # the 4B would leave less than half of the throughput
        (32, "acestep-5Hz-lm-1.7B"),
        (48, "acestep-5Hz-lm-4B"),
        (140, "acestep-5Hz-lm-4B"),
    ],
)
def test_by_default_it_is_the_largest_that_leaves_room_and_half_of_the_throughput(
    vram_gb: float, model: str | None
) -> None:
    chosen = plan(vram_gb)
    assert (chosen.model if chosen else None) == model


def test_what_the_model_leaves_is_the_renderers() -> None:
    chosen = plan(24, model=LMS[-1])
    assert chosen is not None
    assert renderer_share(chosen, 24) == pytest.approx(24 - 12e9 / GIB - 1)
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


def named(size: LmSize, vram_gb: float, name: str = "my-finetune") -> LmPlan:
    chosen = plan(vram_gb, model=name, sizes={name: size})
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("model", LMS)
def test_in_int8_a_model_gets_less_memory_by_what_its_weights_are_smaller(model: str) -> None:
    plans = [plan_lm(LmRequest(init=True, model=model, int8=int8), BUILT_IN.tier_of(24), 24) for int8 in (False, True)]
    plain, small = (plan for plan in plans if plan)
    freed = plain.size.weights - small.size.weights
    assert plain.memory_gb - small.memory_gb == pytest.approx(freed / 1e9)
    assert 0.3 < freed / plain.size.weights < 0.5  # embedding and head stay in bfloat16


def test_in_int8_a_card_of_8_gb_has_room_for_the_smallest_beside_the_renderer() -> None:
    wish = LmRequest(init=True, model=LMS[0])
    plain, small = (plan_lm(each, BUILT_IN.tier_of(8), 8) for each in (wish, replace(wish, int8=True)))
    assert plain is not None
    assert plain.memory_gb + OFFLOADED_RENDERER_GB + RESERVE_GB > 8
    assert small is not None
    assert small.memory_gb + OFFLOADED_RENDERER_GB - INT8_FREES_GB + RESERVE_GB < 8


def test_a_model_of_ones_own_has_the_memory_of_its_size_and_not_of_its_name() -> None:
    sizes = {name: LM_SIZES[name] for name in LMS}
    assert [named(size, 24).memory_gb for size in sizes.values()] == list(LM_MEMORY_GB.values())
    assert named(sizes[LMS[0]], 24, name=LMS[-1]).memory_gb == 3
    assert named(LmSize(100_000_000, 8), 24).memory_gb == 3
    assert 3 < named(LmSize(1_200_000_000, 28), 24).memory_gb < 8
    unknown, huge = plan(141, model="my-finetune"), named(LmSize(8_189_000_000, 36), 141)
    assert unknown is not None
    assert huge.memory_gb == unknown.memory_gb + 8


def test_a_model_of_ones_own_that_is_too_large_for_the_tier_falls_back_as_a_published_one() -> None:
    chosen = named(LM_SIZES[LMS[-1]], 15)
    assert (chosen.model, chosen.size) == (LMS[1], LM_SIZES[LMS[1]])
    assert "my-finetune: too large for tier5" in chosen.warnings[0]
    assert named(LmSize(LM_SIZES[LMS[1]].parameters + 10**6, 28), 15).model == "my-finetune"


def test_the_default_is_chosen_by_the_sizes_on_the_disk() -> None:
    chosen = plan(48, on_disk=frozenset(LMS), sizes={LMS[-1]: LmSize(14_000_000_000, 40)})
    assert chosen is not None
    assert chosen.model == LMS[1]


SMALL, MIDDLE, LARGE = LMS
HUB = frozenset({SMALL, LARGE})


def on_disk(*models: str, vram_gb: float = 80, hub: frozenset[str] = HUB, **wish: object) -> LmPlan:
    chosen = plan(vram_gb, on_disk=frozenset(models), on_hub=hub, **wish)
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("models", [(LARGE,), (SMALL, LARGE), LMS])
def test_the_largest_that_fits_is_used_without_a_word_when_it_is_on_the_disk(models: tuple[str, ...]) -> None:
    chosen = on_disk(*models)
    assert (chosen.model, chosen.warnings) == (LARGE, ())


@pytest.mark.parametrize(("models", "used"), [((SMALL,), SMALL), ((SMALL, MIDDLE), MIDDLE)])
def test_a_smaller_one_on_the_disk_goes_before_a_download(models: tuple[str, ...], used: str) -> None:
    chosen = on_disk(*models)
    assert chosen.model == used
    assert chosen.warnings == (f"{used} is used: {LARGE} would suit this GPU better, but is not on the disk",)
    assert chosen.memory_gb == LM_MEMORY_GB[used] + (80 - 24) * 0.4


def test_one_that_is_too_slow_for_the_gpu_is_used_where_no_other_is_on_the_disk() -> None:
    chosen = on_disk(LARGE, vram_gb=24)
    assert chosen.model == LARGE
    assert chosen.warnings == (f"{LARGE} is used: {MIDDLE} would suit this GPU better, but is not on the disk",)
    assert on_disk(SMALL, LARGE, vram_gb=24).model == LARGE  # which keeps more than half of the small one's throughput


def test_the_cost_of_the_choice_is_said_where_there_was_one() -> None:
    at_24, at_48 = plan(24), plan(48)
    assert at_24 is not None
    assert at_48 is not None
    assert at_24.trade_off == (
        f"{LARGE} would make about 43% of its songs a minute; ACESTEP_LM_MODEL_PATH chooses another"
    )
    assert at_48.trade_off.startswith(f"{SMALL} would make about 188% of its songs a minute")
    for chosen in (plan(13), plan(24, model=LARGE), plan(0, init=True)):
        assert chosen is not None
        assert chosen.trade_off == ""


def test_with_none_on_the_disk_the_largest_that_can_be_downloaded_is() -> None:
    chosen = on_disk()
    assert chosen.model == LARGE
    assert chosen.warnings == (f"no language model for this GPU is on the disk: {LARGE} is downloaded",)
    assert on_disk(vram_gb=16).model == SMALL  # the hub has no repository of the middle one alone


def test_one_that_is_too_large_for_the_gpu_is_named_and_not_used() -> None:
    chosen = on_disk(LARGE, vram_gb=16)
    assert chosen.model == SMALL
    assert f"({LARGE}: too large for tier6 with 16 GB): {SMALL} is downloaded" in chosen.warnings[0]


def test_where_there_is_no_way_to_one_it_is_said_which_is_missing() -> None:
    chosen = on_disk(vram_gb=16, hub=frozenset(), init=True)
    assert chosen.required
    assert chosen.warnings == (
        f"no language model for this GPU is on the disk: put {SMALL} or {MIDDLE} into ACESTEP_CHECKPOINT_DIR",
    )


def test_a_cpu_takes_the_one_that_is_there() -> None:
    assert on_disk(MIDDLE, vram_gb=0, init=True).model == MIDDLE
    assert on_disk(SMALL, MIDDLE, vram_gb=0, init=True).model == SMALL


def test_one_that_the_operator_named_is_used_wherever_it_is() -> None:
    chosen = on_disk(SMALL, model=LARGE)
    assert (chosen.model, chosen.warnings) == (LARGE, ())
