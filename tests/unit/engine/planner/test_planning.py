# SPDX-License-Identifier: Apache-2.0
"""Decisions of planning that need no model: phases, sampling, lengths. The golden cases hold the rest."""

from dataclasses import replace

import pytest

from acestep_consumer.domain.job import Job, Request
from acestep_consumer.engine.planner.planning import draft_of, needs_metadata, sampling_of
from acestep_consumer.policy.admit import admit
from acestep_schemas.events import LmChoice
from acestep_schemas.request import parse_request
from tests.support.admission import make_limits

FOUR = {"bpm": 92, "key_scale": "F# minor", "time_signature": "4", "audio_duration": 30.7}


def job(**fields: object) -> Job:
    body, warnings = parse_request({"prompt": "slow jazz", **fields})
    limits = replace(make_limits(), lm=LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt"))
    return admit(Request("task-1", body, warnings), limits)


def needs(**fields: object) -> bool:
    found = job(**fields)
    return needs_metadata(found, draft_of(found))


def test_the_metadata_phase_is_left_out_where_all_four_values_are_given() -> None:
    assert not needs(thinking=True, **FOUR)
    assert needs(analysis_only=True, **FOUR)


@pytest.mark.parametrize("missing", FOUR)
def test_one_missing_value_is_enough_for_the_metadata_phase(missing: str) -> None:
    assert needs(thinking=True, **{field: value for field, value in FOUR.items() if field != missing})


def test_the_metadata_phase_may_be_switched_off() -> None:
    assert not needs(thinking=True, use_cot_metas=False)
    assert needs(analysis_only=True, use_cot_metas=False)


def test_a_fraction_of_a_second_is_cut_off_in_the_thoughts() -> None:
    assert draft_of(job(thinking=True, **FOUR)).metadata.duration == 30


def test_what_the_model_does_not_know_is_as_in_the_request() -> None:
    known = job(thinking=True, **FOUR)
    asked = {"key_scale": "D dorian", "time_signature": "5/4", "bpm": 20, "vocal_language": "Klingon"}
    unknown = replace(known, request=known.request.model_copy(update=asked), given=known.given | set(asked))
    metadata = draft_of(unknown).metadata
    assert (metadata.keyscale, metadata.timesignature, metadata.bpm) == ("D dorian", "5/4", 20)
    assert metadata.language == "Klingon"
    assert not needs_metadata(unknown, draft_of(unknown))


@pytest.mark.parametrize(("asked", "applied"), [(0, 1), (0.5, 1), (1, 1), (2.5, 2.5)])
def test_a_guidance_scale_below_one_is_none(asked: float, applied: float) -> None:
    assert sampling_of(job(lm_cfg_scale=asked).request, 7, guided=True).cfg_scale == applied
    assert sampling_of(job(lm_cfg_scale=asked).request, 7, guided=False).cfg_scale == 1


def test_a_penalty_on_repetition_has_no_effect_and_that_is_said() -> None:
    asked = job(thinking=True, lm_repetition_penalty=1.3)
    assert sampling_of(asked.request, 7, guided=True).repetition_penalty == 1
    assert draft_of(asked).warnings[0].startswith("lm_repetition_penalty = 1.3 has no effect")
    assert not draft_of(job(thinking=True)).warnings
