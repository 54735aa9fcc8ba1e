# SPDX-License-Identifier: Apache-2.0
"""Which larger tiers are better for a request."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.domain.job import Request
from acestep_consumer.execution.tier_forwarding import TierForwarding
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.tier_choice import better_tiers, queue_names, served_names
from acestep_consumer.policy.tiers import BUILT_IN, NEWER, TierTable, TierTableError
from acestep_schemas.events import LmChoice
from acestep_schemas.request import parse_request
from tests.support.admission import make_limits

if TYPE_CHECKING:
    from collections.abc import Sequence

LM = LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt")
ALL_GIVEN = {"bpm": 100, "key_scale": "C major", "time_signature": "4"}
NAMES = [tier.name for tier in BUILT_IN.tiers]


def asked(**fields: object) -> Request:
    body, warnings = parse_request({"prompt": "jazz", **fields})
    return Request(body.task_id or "task-1", body, warnings)


def offered(request: Request, limits: Limits, came_by: str | None = None) -> Sequence[str]:
    return list(better_tiers(request, limits, BUILT_IN, came_by))


def test_what_fits_here_goes_nowhere() -> None:
    assert offered(asked(audio_duration=180, batch_size=1), make_limits(4)) == []


def test_the_smallest_card_that_grants_all_is_asked_first_and_those_that_grant_more_than_here_follow() -> None:
    limits = replace(make_limits(12), lm=LM)
    assert offered(asked(audio_duration=480, batch_size=4), limits) == ["tier6", "unlimited"]
    assert offered(asked(audio_duration=600, batch_size=8), limits) == ["unlimited", "tier6"]


def test_a_card_that_would_grant_no_more_is_left_out() -> None:
    # 300 s with the language model: tiers 3 to 5 allow 240, no more than this one.
    limits = replace(make_limits(8), lm=LM)
    assert offered(asked(audio_duration=300, thinking=True), limits) == ["tier6", "unlimited"]


def test_the_largest_card_keeps_everything() -> None:
    assert offered(asked(audio_duration=600, batch_size=8), make_limits(80)) == []
    assert offered(asked(audio_duration=9_000), make_limits(80)) == []


def test_what_a_tier_does_not_bound_is_no_reason_to_go_elsewhere() -> None:
    assert offered(asked(bpm=900, audio_duration=3), make_limits(4)) == []


def test_a_request_that_needs_the_language_model_goes_where_one_is_loaded_by_default() -> None:
    assert offered(asked(thinking=True, audio_duration=60), make_limits(4)) == ["tier5", "tier6", "unlimited"]


def test_who_wants_rejection_goes_only_where_all_of_it_is_granted() -> None:
    request = asked(audio_duration=500, batch_size=1, on_limit="reject", **ALL_GIVEN)
    assert offered(request, make_limits(24)) == ["unlimited"]
    assert offered(asked(audio_duration=700, on_limit="reject"), make_limits(12)) == []


def test_a_request_that_fails_anywhere_stays() -> None:
    assert offered(asked(task_type="repaint", audio_duration=600), make_limits(4)) == []


def test_who_was_sent_on_is_only_sent_further_up() -> None:
    request = asked(audio_duration=600, batch_size=8)
    assert offered(request, make_limits(4), came_by="tier6") == ["unlimited"]
    assert offered(request, make_limits(12), came_by="tier2") == ["unlimited", "tier6"]
    assert offered(request, make_limits(4), came_by="unlimited") == []


def test_a_tier_that_this_table_does_not_know_is_the_end_of_the_way() -> None:
    request = asked(audio_duration=600, batch_size=8)
    assert offered(request, make_limits(4), came_by="colossal") == []
    stranger = replace(make_limits(4), tier=BUILT_IN.tiers[0].model_copy(update={"name": "elsewhere"}))
    assert offered(request, stranger) == []


@given(
    vram_gb=st.sampled_from([0, 4, 6, 8, 12, 15, 24, 80]),
    seconds=st.integers(1, 900),
    songs=st.integers(1, 8),
    came_by=st.sampled_from([None, *NAMES]),
    thinking=st.booleans(),
    on_limit=st.sampled_from(["clamp", "reject"]),
)
def test_every_way_goes_up_and_is_named_once(
    vram_gb: float,
    seconds: int,
    songs: int,
    came_by: str | None,
    thinking: bool,  # noqa: FBT001 - drawn by name
    on_limit: str,
) -> None:
    request = asked(audio_duration=seconds, batch_size=songs, thinking=thinking, on_limit=on_limit)
    limits = make_limits(vram_gb)
    ranks = [NAMES.index(name) for name in offered(request, limits, came_by)]
    below = max(NAMES.index(name) for name in (limits.tier.name, came_by or limits.tier.name))
    assert all(rank > below for rank in ranks)
    assert len(set(ranks)) == len(ranks)


def test_a_larger_card_really_grants_what_it_was_chosen_for() -> None:
    request, limits = asked(audio_duration=241, batch_size=2), make_limits(6)
    best = BUILT_IN.tiers[NAMES.index(offered(request, limits)[0])]
    assert admit(request, limits).policy.adjustments != ()
    assert admit(request, replace(limits, tier=best)).policy.adjustments == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_of_cards_ends(name: str) -> None:
    """Wherever a request is, and whatever the workers say, it can be sent on at most once a tier."""
    request, steps = asked(audio_duration=600, batch_size=8), 0
    while ways := offered(request, make_limits(4), came_by=name):
        name, steps = ways[-1], steps + 1
    assert steps < len(NAMES)


@pytest.mark.parametrize("name", ["24 GB", "größer", "#", "probe-1", BUILT_IN.tiers[0].name])
def test_a_name_that_cannot_be_that_of_one_queue_is_refused(name: str) -> None:
    last = BUILT_IN.tiers[-1].model_copy(update={"name": name})
    table = BUILT_IN.model_copy(update={"tiers": (*BUILT_IN.tiers[:-1], last)})
    with pytest.raises(TierTableError, match=name):
        TierForwarding(lambda: make_limits(4), table)


def test_a_table_of_ones_own_cannot_change_what_others_count_on() -> None:
    """Else a worker with a shipped table would forward 600 s to a tier that makes 60 of them."""
    small = BUILT_IN.tiers[-1].model_copy(update={"max_seconds": 60, "max_seconds_with_lm": 60})
    ours = TierTable(version="ours-1", tiers=(*BUILT_IN.tiers[:-1], small))
    for refused in (queue_names, served_names, lambda table: TierForwarding(lambda: make_limits(4), table)):
        with pytest.raises(TierTableError, match="unlimited must have names of their own, such as our-unlimited"):
            refused(ours)
    renamed = TierTable(version="ours-1", tiers=(*BUILT_IN.tiers[:-1], small.model_copy(update={"name": "our-large"})))
    assert queue_names(renamed)[-1] == "our-large"
    assert queue_names(TierTable(version="ours-2", tiers=NEWER.tiers)) == queue_names(NEWER)


@pytest.mark.parametrize("table", [BUILT_IN, NEWER], ids=lambda table: table.version)
def test_workers_look_after_the_queues_of_both_shipped_tables_their_own_first(table: TierTable) -> None:
    names = served_names(table)
    assert names[: len(table.tiers)] == tuple(tier.name for tier in table.tiers)
    assert set(names) == {tier.name for shipped in (BUILT_IN, NEWER) for tier in shipped.tiers}


@given(
    cards=st.lists(st.tuples(st.sampled_from([BUILT_IN, NEWER]), st.sampled_from([0, 4, 6, 8, 12, 15, 18, 24, 80]))),
    seconds=st.integers(1, 900),
    songs=st.integers(1, 8),
    thinking=st.booleans(),
)
def test_among_workers_with_different_tables_a_request_goes_up_and_ends(
    cards: list[tuple[TierTable, float]],
    seconds: int,
    songs: int,
    thinking: bool,  # noqa: FBT001 - drawn by name
) -> None:
    """Each worker on its way forwards it to the best tier that there is, whoever serves that."""
    request = asked(audio_duration=seconds, batch_size=songs, thinking=thinking)
    came_by, visited = None, []
    for table, vram_gb in cards:
        limits = replace(make_limits(vram_gb), tier=table.tier_of(vram_gb))
        ways = list(better_tiers(request, limits, table, came_by))
        if not ways:
            break
        came_by = ways[0]
        visited.append(came_by)
    assert len(set(visited)) == len(visited)
    for table in (BUILT_IN, NEWER):
        ranks = [rank for name in visited for rank, tier in enumerate(table.tiers) if tier.name == name]
        assert ranks == sorted(ranks)
