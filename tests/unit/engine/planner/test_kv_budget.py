# SPDX-License-Identifier: Apache-2.0
"""How much vLLM is given at once."""

from acestep_consumer.engine.planner.kv_budget import KvBudget, SequenceCost


def test_a_song_needs_rows_blocks_to_its_end_and_its_prompts_at_once() -> None:
    room = KvBudget(rows=8, blocks=100, block=16, step=1000)
    # 15 + 1 tokens of text and one that is planned ahead fill two blocks; 14 fit into one.
    assert room.need([range(15), range(14)], 1) == SequenceCost(rows=2, blocks=3, tokens=29)


def test_what_is_taken_is_not_there_until_it_is_given_back() -> None:
    room = KvBudget(rows=4, blocks=10, block=16, step=100)
    pair = SequenceCost(rows=2, blocks=5, tokens=30)
    assert room.take(pair)
    assert room.take(pair)
    assert not room.take(pair)
    room.leave(pair)
    assert room.take(pair)
    room.leave(pair)
    room.leave(pair)
    assert room.empty


def test_each_bound_holds_by_itself() -> None:
    room = KvBudget(rows=4, blocks=10, block=16, step=100)
    for need in (SequenceCost(5, 1, 1), SequenceCost(1, 11, 1), SequenceCost(1, 1, 101)):
        assert not room.could_hold(need)
        assert not room.take(need)
    assert room.could_hold(SequenceCost(4, 10, 100))
    assert room.take(SequenceCost(4, 10, 100))


def test_a_step_has_a_token_less_for_newcomers_with_every_row_that_is_there() -> None:
    room = KvBudget(rows=10, blocks=10, block=16, step=20)
    assert room.take(SequenceCost(rows=6, blocks=1, tokens=18))
    assert not room.take(SequenceCost(rows=1, blocks=1, tokens=3))
    room.begin_step()
    assert not room.take(SequenceCost(rows=1, blocks=1, tokens=15))
    assert room.take(SequenceCost(rows=1, blocks=1, tokens=14))
