# SPDX-License-Identifier: Apache-2.0
"""The budget of what vLLM is given at once."""

from acestep_consumer.engine.planner.vllm_sequence import KvBudget, SequenceCost


def test_a_sequence_costs_its_rows_all_its_blocks_and_its_prompts_tokens() -> None:
    budget = KvBudget(rows=8, blocks=100, block=16, step=1000)
    # 15 + 1 tokens of text and one that is planned ahead fill two blocks; 14 fit into one.
    assert budget.cost_of([range(15), range(14)], 1) == SequenceCost(rows=2, blocks=3, tokens=29)


def test_reserved_capacity_is_free_again_after_its_release() -> None:
    budget = KvBudget(rows=4, blocks=10, block=16, step=100)
    pair = SequenceCost(rows=2, blocks=5, tokens=30)
    assert budget.reserve(pair)
    assert budget.reserve(pair)
    assert not budget.reserve(pair)
    budget.release(pair)
    assert budget.reserve(pair)
    budget.release(pair)
    budget.release(pair)
    assert budget.empty


def test_each_limit_holds_by_itself() -> None:
    budget = KvBudget(rows=4, blocks=10, block=16, step=100)
    for cost in (SequenceCost(5, 1, 1), SequenceCost(1, 11, 1), SequenceCost(1, 1, 101)):
        assert not budget.could_hold(cost)
        assert not budget.reserve(cost)
    assert budget.could_hold(SequenceCost(4, 10, 100))
    assert budget.reserve(SequenceCost(4, 10, 100))


def test_every_reserved_row_takes_one_token_of_a_step() -> None:
    budget = KvBudget(rows=10, blocks=10, block=16, step=20)
    assert budget.reserve(SequenceCost(rows=6, blocks=1, tokens=18))
    assert not budget.reserve(SequenceCost(rows=1, blocks=1, tokens=3))
    budget.begin_step()
    assert not budget.reserve(SequenceCost(rows=1, blocks=1, tokens=15))
    assert budget.reserve(SequenceCost(rows=1, blocks=1, tokens=14))
