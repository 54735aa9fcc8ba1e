# SPDX-License-Identifier: Apache-2.0
"""The arithmetic from logits to tokens, against plain formulas, and against what a seed promises."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from acestep_consumer.engine.planner.backend import Sampling
from acestep_consumer.engine.planner.guidance import MASKED, RowSampling, choose, exponential, guide

VOCABULARY = 3000
PLAIN = Sampling(seed=1, temperature=1.0)


def logits_of(rows: int, seed: int = 0, columns: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def rows_of(*samplings: Sampling) -> RowSampling:
    return RowSampling.of(samplings, "cpu")


def steps(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def support(logits: Tensor, sampling: Sampling, draws: int = 1000) -> set[int]:
    """Every token that comes up in many draws from one row of logits."""
    rows = rows_of(*(replace(sampling, seed=seed) for seed in range(draws)))
    return set(choose(logits.expand(draws, -1), rows, torch.zeros(draws, dtype=torch.int64)).tolist())


def sorted_nucleus(logits: Tensor, top_p: float) -> set[int]:
    """The textbook's way: sort, add up, cut."""
    probabilities, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    return set(order[before < top_p].tolist())


def drawn_by_formula(logits: Tensor, sampling: Sampling, step: int, keep: set[int]) -> int:
    """The Gumbel-max trick as it is usually written, over the tokens in ``keep``."""
    noise = exponential(torch.tensor([sampling.seed]), steps(step), len(logits))[0].double()
    scores = logits.double() / sampling.temperature - noise.log()
    kept = sorted(keep)
    return kept[int(scores[kept].argmax())]


def test_guidance_is_the_weighted_sum_and_keeps_what_the_conditional_masks() -> None:
    conditional = torch.tensor([[1.0, 2.0, MASKED, MASKED], [0.5, -1.0, 3.0, 0.0]])
    unconditional = torch.tensor([[3.0, -2.0, 1.0, MASKED], [0.5, 1.0, 1.0, 0.0]])
    guided = guide(conditional, unconditional, torch.tensor([[2.0], [3.0]]))
    assert guided.tolist() == [[-1.0, 6.0, MASKED, MASKED], [0.5, -5.0, 7.0, 0.0]]


def test_guidance_is_in_float32_whatever_comes_in() -> None:
    conditional, unconditional = logits_of(1).bfloat16(), logits_of(1, seed=1).bfloat16()
    guided = guide(conditional, unconditional, 2.5)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, unconditional.float() + 2.5 * (conditional.float() - unconditional.float()))


def test_a_row_that_is_its_own_unconditional_comes_out_unchanged() -> None:
    logits = logits_of(3)
    assert torch.equal(guide(logits, logits, torch.tensor([[1.0], [2.5], [7.0]])), logits)


def test_temperature_0_takes_the_likeliest_token_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 9.0, 9.0]])
    greedy = Sampling(seed=1, temperature=0, top_p=0.5, top_k=2)
    assert choose(logits, rows_of(greedy, greedy), steps(0, 0)).tolist() == [1, 0]


def test_temperature_0_tells_apart_what_the_exponential_function_cannot() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-23]])
    sampling = replace(PLAIN, temperature=0)
    assert choose(logits, rows_of(sampling), steps(0)).tolist() == [1]
    beside_a_random_row = choose(logits.expand(2, -1), rows_of(PLAIN, sampling), steps(0, 0))
    assert beside_a_random_row[1] == 1


@pytest.mark.parametrize("temperature", [0.3, 0.85, 2.0])
def test_a_draw_is_the_gumbel_max_formula(temperature: float) -> None:
    samplings = [Sampling(seed=seed, temperature=temperature) for seed in range(50)]
    logits = logits_of(50)
    chosen = choose(logits, rows_of(*samplings), torch.arange(50))
    everything = set(range(VOCABULARY))
    expected = [drawn_by_formula(logits[row], samplings[row], row, everything) for row in range(50)]
    assert chosen.tolist() == expected


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_a_sort_would_keep(top_p: float) -> None:
    samplings = [Sampling(seed=seed, top_p=top_p, temperature=1.0) for seed in range(30)]
    logits = logits_of(30)
    chosen = choose(logits, rows_of(*samplings), torch.zeros(30, dtype=torch.int64))
    expected = [drawn_by_formula(logits[r], samplings[r], 0, sorted_nucleus(logits[r], top_p)) for r in range(30)]
    assert chosen.tolist() == expected


def test_top_p_keeps_the_smallest_set_exactly() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert support(logits, replace(PLAIN, top_p=0.39)) == {1}
    assert support(logits, replace(PLAIN, top_p=0.41)) == {1, 2}
    assert support(logits, replace(PLAIN, top_p=0.69)) == {1, 2}
    assert support(logits, replace(PLAIN, top_p=0.71)) == {1, 2, 3}
    assert support(logits, replace(PLAIN, top_p=0.91)) == {0, 1, 2, 3}


def test_top_p_breaks_ties_as_a_stable_sort_does() -> None:
    assert support(torch.zeros(8), replace(PLAIN, top_p=0.5)) == {0, 1, 2, 3}
    assert support(torch.tensor([0.0, 2.0, 0.0, 0.0]), replace(PLAIN, top_p=0.8)) == {0, 1}


def test_top_p_on_coarse_logits_keeps_what_a_sort_would_keep() -> None:
    """A bfloat16 head gives many equal logits, so that ties are the rule at the border."""
    logits = (logits_of(1, columns=400)[0] * 2).round() / 2
    assert support(logits, replace(PLAIN, top_p=0.6), draws=5_000) == sorted_nucleus(logits, 0.6)


def test_a_tiny_top_p_keeps_one_token() -> None:
    assert support(logits_of(1)[0], replace(PLAIN, top_p=0.0), draws=200) == {int(logits_of(1)[0].argmax())}


def test_top_k_keeps_the_k_likeliest_and_their_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert support(logits, replace(PLAIN, top_k=1)) == {1}
    assert support(logits, replace(PLAIN, top_k=2)) == {1, 2, 3}
    assert support(logits, replace(PLAIN, top_k=4)) == {0, 1, 2, 3}
    assert support(logits, replace(PLAIN, top_k=0)) == {0, 1, 2, 3, 4}
    assert support(logits, replace(PLAIN, top_k=99)) == {0, 1, 2, 3, 4}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert support(logits, replace(PLAIN, top_k=2, top_p=0.6)) == {0, 1}
    assert support(logits, replace(PLAIN, top_k=2, top_p=0.5)) == {0}


def test_the_repetition_penalty_pushes_seen_tokens_down_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0], [-2.0, -3.0, -3.5]])
    seen = torch.tensor([[True, False, False], [True, False, True]])
    sampling = Sampling(seed=1, temperature=0, repetition_penalty=2.0)
    assert choose(logits, rows_of(sampling, sampling), steps(0, 0), seen).tolist() == [1, 1]
    assert choose(logits, rows_of(PLAIN, sampling), steps(0, 0), torch.zeros_like(seen)).tolist()[1] == 0


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 40), MASKED)
    logits[:, 17] = -80.0
    for sampling in (PLAIN, replace(PLAIN, top_p=0.5), replace(PLAIN, top_k=5), replace(PLAIN, temperature=1e-4)):
        rows = rows_of(*(replace(sampling, seed=seed) for seed in range(500)))
        assert set(choose(logits, rows, torch.arange(500)).tolist()) == {17}


@pytest.mark.parametrize("broken", [MASKED, float("nan"), float("inf")])
def test_a_row_that_cannot_be_drawn_from_disturbs_no_other(broken: float) -> None:
    samplings = [Sampling(seed=seed, top_p=0.9, top_k=40, temperature=(0.8, 0)[seed % 2]) for seed in range(6)]
    logits = logits_of(6)
    expected = choose(logits, rows_of(*samplings), torch.arange(6))
    logits[2:4] = broken
    chosen = choose(logits, rows_of(*samplings), torch.arange(6))
    assert chosen[[0, 1, 4, 5]].tolist() == expected[[0, 1, 4, 5]].tolist()
    assert ((chosen >= 0) & (chosen < VOCABULARY)).all()


def test_draws_have_the_probabilities_of_the_logits() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125], dtype=torch.float64)
    draws = 10_000
    for over_seeds in (True, False):
        seeds = range(draws) if over_seeds else [7] * draws
        step = torch.zeros(draws, dtype=torch.int64) if over_seeds else torch.arange(draws)
        rows = rows_of(*(replace(PLAIN, seed=seed) for seed in seeds))
        chosen = choose(probabilities.log().float().expand(draws, -1), rows, step)
        assert chi_square(chosen.bincount(minlength=6), probabilities) < 20.5  # 5 degrees of freedom: 1 in 1,000


def test_draws_over_a_large_vocabulary_are_even() -> None:
    draws, columns = 640, 64_000
    parts = [
        choose(
            torch.zeros(64, columns),
            rows_of(*(replace(PLAIN, seed=seed) for seed in range(at, at + 64))),
            torch.zeros(64, dtype=torch.int64),
        )
        for at in range(0, draws, 64)
    ]
    in_32nds = (torch.cat(parts) // 2000).bincount(minlength=32)
    assert chi_square(in_32nds, torch.full((32,), 1 / 32)) < 61  # 31 degrees of freedom: 1 in 1,000


def test_the_noise_is_exponential_and_neighbours_have_nothing_in_common() -> None:
    noise = exponential(torch.arange(8), torch.tensor([0, 0, 0, 0, 1, 2, 3, 4]), 64_000).double()
    assert (noise > 0).all()
    assert torch.allclose(noise.mean(-1), torch.ones(8, dtype=torch.float64), atol=0.02)
    assert torch.allclose(noise.var(-1), torch.ones(8, dtype=torch.float64), atol=0.06)
    in_tenths = ((-torch.expm1(-noise[0])) * 10).long().bincount(minlength=10)
    assert chi_square(in_tenths, torch.full((10,), 0.1)) < 27.9  # 9 degrees of freedom: 1 in 1,000
    between_rows = noise.corrcoef() - torch.eye(8)
    between_tokens = torch.stack((noise[0, :-1], noise[0, 1:])).corrcoef()[0, 1]
    assert between_rows.abs().max() < 0.02
    assert between_tokens.abs() < 0.02


def test_a_row_does_not_depend_on_its_neighbours_bit_for_bit() -> None:
    samplings = [Sampling(seed=9 * n, top_p=(0.9, 1.0)[n % 2], top_k=(0, 0, 50)[n % 3]) for n in range(24)]
    logits, step = logits_of(24), torch.arange(24) * 3
    together = choose(logits, rows_of(*samplings), step)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    shuffled = rows_of(*(samplings[index] for index in order.tolist()))
    assert torch.equal(choose(logits[order], shuffled, step[order]), together[order])
    alone = [choose(logits[n : n + 1], rows_of(samplings[n]), step[n : n + 1]).item() for n in range(24)]
    assert together.tolist() == alone


def test_the_settings_of_a_row_do_not_leak_into_others() -> None:
    logits = logits_of(4)
    plain = choose(logits, rows_of(*[PLAIN] * 4), steps(0, 1, 2, 3))
    others = (replace(PLAIN, temperature=0), replace(PLAIN, top_k=3, top_p=0.2), replace(PLAIN, repetition_penalty=9))
    mixed = choose(logits, rows_of(PLAIN, *others), steps(0, 1, 2, 3), torch.ones_like(logits, dtype=torch.bool))
    assert mixed[0] == plain[0]


def test_a_seed_gives_the_same_again_and_other_seeds_and_steps_give_other_tokens() -> None:
    logits = logits_of(1).expand(64, -1) / 10
    by_seed = choose(logits, rows_of(*(replace(PLAIN, seed=n) for n in range(64))), torch.zeros(64, dtype=torch.int64))
    by_step = choose(logits, rows_of(*[PLAIN] * 64), torch.arange(64))
    again = choose(logits, rows_of(*[PLAIN] * 64), torch.arange(64))
    assert torch.equal(by_step, again)
    assert len(set(by_seed.tolist())) > 55
    assert len(set(by_step.tolist())) > 55


def test_the_noise_is_the_published_hash_so_that_a_seed_outlives_a_release() -> None:
    seeds, numbers = (0, 1, -1, 2**63, 2**64 - 1, 123456789), (0, 1, 2, 1499, 7, 42)
    rows = rows_of(*(Sampling(seed=seed) for seed in seeds))
    noise = exponential(rows.seed, steps(*numbers), 5, first=151_669)
    for row, (seed, number) in enumerate(zip(seeds, numbers, strict=True)):
        expected = [noise_in_plain_python(seed, number, token) for token in range(151_669, 151_674)]
        assert noise[row].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_slice_of_the_logits_draws_what_the_whole_would() -> None:
    logits = logits_of(6)
    rows = rows_of(*(Sampling(seed=seed, top_p=0.9) for seed in range(6)))
    whole = logits.clone()
    whole[:, :1000] = MASKED
    whole[:, 2500:] = MASKED
    sliced = choose(logits[:, 1000:2500], rows, torch.arange(6), first=1000)
    assert torch.equal(sliced + 1000, choose(whole, rows, torch.arange(6)))


def test_it_compiles_as_one_graph_which_serves_other_seeds_too() -> None:
    counter = CompileCounter()
    compiled = torch.compile(choose, backend=counter, fullgraph=True, dynamic=False)
    logits = logits_of(4)
    for seed in (1, 50, 100):
        rows = rows_of(*(Sampling(seed=seed + n, top_p=0.9, top_k=(20, 30)[n % 2]) for n in range(4)))
        assert torch.equal(compiled(logits, rows, torch.arange(4)), choose(logits, rows, torch.arange(4)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_taken_as_they_are(dtype: torch.dtype) -> None:
    logits = logits_of(4).to(dtype)
    rows = rows_of(*(Sampling(seed=seed, top_p=0.9) for seed in range(4)))
    assert torch.equal(choose(logits, rows, torch.arange(4)), choose(logits.float(), rows, torch.arange(4)))


def test_the_host_knows_which_parts_a_step_can_skip() -> None:
    greedy = Sampling(seed=1, temperature=0, top_p=0.5)
    rows = rows_of(greedy, PLAIN)
    assert (rows.greedy, rows.random, rows.nucleus, rows.penalised, rows.max_top_k) == (True, True, False, False, 0)
    busy = rows_of(greedy, PLAIN, Sampling(seed=1, top_k=50, top_p=0.9, repetition_penalty=1.1))
    assert (busy.nucleus, busy.penalised, busy.max_top_k) == (True, True, 64)
    assert not rows_of(greedy).random


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def noise_in_plain_python(seed: int, step: int, token: int) -> float:
    """SplitMix64 of seed and step; MurmurHash3's finalizer over the token; then an exponential number."""

    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    row = mix64((mix64(seed % 2**64) + step) % 2**64)
    multiplier, offset = (row >> 32) | 1, row % 2**32
    bits = mix32((mix32(token) * multiplier + offset) % 2**32)
    return -math.log1p(-((bits >> 1) + 0.5) / 2**31)
