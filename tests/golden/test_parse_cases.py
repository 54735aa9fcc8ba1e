# SPDX-License-Identifier: Apache-2.0
"""Bodies as the original's request parser reads them: what reaches generation there is what the request says here."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlencode

import pytest

from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.parse import RequestRules, parse
from acestep_consumer.domain.ports import BodyFormat
from acestep_schemas.request import GenerationRequest
from tests.golden.golden_data import GoldenCase, cases

PARSE: Final = cases(lambda kind: kind == "parse")

# Fields that the original's typed request and ours have; of a value it is compared what it means.
_MEANING: Final[Mapping[str, Callable[[Any], object]]] = {
    "audio_code_string": lambda value: tuple(re.findall(r"audio_code_(\d+)", str(value))),
    "audio_duration": lambda value: value if value and value > 0 else None,
    "audio_format": lambda value: str(value).lower(),
    "bpm": lambda value: value or None,
    "key_scale": lambda value: value or None,
    "prompt": lambda value: value[:8_192],  # the tokenizer reads 256 tokens of it
    "lm_top_k": lambda value: value or 0,
    "lm_top_p": lambda value: value if value and 0 < value <= 1 else 1.0,
    "repainting_end": lambda value: value if value and value > 0 else None,
    "shift": lambda value: value if value > 0 else 1.0,
    "time_signature": lambda value: value or None,
    "track_classes": lambda value: tuple(value or ()),
    "track_name": lambda value: value or None,
    "inference_steps": lambda value: max(1, value),
}
# The original answers with the default there, or it is compared elsewhere.
_NOT_COMPARED: Final = frozenset(
    {
        *("seed", "use_random_seed"),  # see `_seeds`
        *("batch_size", "instruction", "lm_backend", "lm_model_path", "model"),
        *("repaint_latent_crossfade_frames", "repaint_wav_crossfade_sec"),  # read there, and overridden by the mode
        *("src_audio_path", "reference_audio_path"),  # local paths there
    }
)

# Decided: (field, our value), and why.
DEPARTURES: Final[Mapping[str, Mapping[str, object]]] = {
    # An unknown format is written as FLAC by the original too, later on.
    "parse_audio_format_unknown": {"audio_format": "flac"},
    # Above 1 every step is the cover's, as with 1.
    "parse_cover_strength_over_1": {"audio_cover_strength": 1.0},
    # Fields of the original's Python interface are fields here.
    "parse_unknown_fields": {"enable_normalization": False, "timesteps": (0.9, 0.5, 0.0)},
    # A whole number may be written with a point.
    "parse_bpm_whole_float": {"bpm": 120},
    # A task's name in other letters is that task; the original takes it for none it knows.
    "parse_task_upper": {"task_type": "cover"},
}
REJECTED: Final[Mapping[str, str]] = {
    "parse_task_unknown": "task_type",  # the original sings it as text2music without its instruction
    "parse_multipart": "multipart/form-data",  # a form of HTTP: a message has no files beside it
}
ACCEPTED: Final[Mapping[str, Mapping[str, object]]] = {
    # The original answers 422; here a seed that cannot be read is random, and a list has a seed for each song.
    "parse_seed_float": {"seed": ()},
    "parse_seed_list": {"seed": (1, 2)},
}


def _itself(value: object) -> object:
    return value


def body_of(case: GoldenCase) -> bytes:
    facts = case.facts
    if facts["raw"] is not None:
        return str(facts["raw"]).encode()
    body = facts["body"]
    if str(facts["content_type"]).startswith("application/x-www-form-urlencoded"):
        return urlencode(body, doseq=True).encode()
    if isinstance(body, dict) and body.get("src_audio_path") == "a.wav":
        body = body | {"src_audio_path": "s3://songs/a.wav"}  # no path of the producer's machine can be read here
    return json.dumps(body).encode()


def outcome(case: GoldenCase) -> GenerationRequest | str:
    written = BodyFormat(content_type=case.facts["content_type"])
    try:
        return parse(body_of(case), "golden", RequestRules(max_bytes=1 << 20), written).body
    except ConsumerError as error:
        return str(error)


def seeds_of(facts: Mapping[str, Any]) -> tuple[int, ...]:
    config = facts.get("config")  # the language model would write first where there is none
    return () if config is None or config["use_random_seed"] else tuple(config["seeds"] or ())


@pytest.mark.parametrize("case", PARSE, ids=lambda case: case.name)
def test_a_body_is_read_as_the_original_reads_it(case: GoldenCase) -> None:
    found = outcome(case)
    if case.name in REJECTED or ("http_error" in case.facts and case.name not in ACCEPTED):
        assert isinstance(found, str)
        assert REJECTED.get(case.name, "") in found
        return
    assert isinstance(found, GenerationRequest), found
    for field, value in (ACCEPTED.get(case.name) or DEPARTURES.get(case.name, {})).items():
        assert getattr(found, field) == value, field
    if case.name in ACCEPTED:
        return
    theirs = case.facts["request"]
    assert found.seed == seeds_of(case.facts)
    compared = set(theirs) & set(GenerationRequest.model_fields) - _NOT_COMPARED - set(DEPARTURES.get(case.name, {}))
    for field in sorted(compared):
        meaning = _MEANING.get(field, _itself)
        assert meaning(getattr(found, field)) == meaning(theirs[field]), field


def test_all_cases_are_here() -> None:
    assert len(PARSE) == 96
