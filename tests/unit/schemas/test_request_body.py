# SPDX-License-Identifier: Apache-2.0
"""The `TypedDict` of a request says what the model says, so that they cannot drift apart."""

import ast
from collections.abc import Mapping
from typing import get_type_hints

from acestep_schemas.aliases import ALIASES, METAS, PARAM_OBJ
from acestep_schemas.request import GenerationRequest, LoraChoice, parse_request
from acestep_schemas.request_body import LoraBody, RequestBody
from infra import request_body as generator

FIELDS = GenerationRequest.model_fields
NESTED = {PARAM_OBJ, *METAS}
FULL: RequestBody = {
    "task_id": "order-4711",
    "prompt": "slow jazz",
    "lyrics": "[inst]",
    "vocal_language": "en",
    "bpm": 72,
    "key_scale": "D minor",
    "time_signature": "3",
    "audio_duration": 30,
    "seed": 42,
    "lora": {"path": "warm.safetensors", "scale": 0.5},
    "loras": ["old", {"path": "wide", "scale": -1, "alpha": 16}],
    "timesteps": [1.0, 0.5, 0.0],
    "track_classes": ["drums", "bass"],
    "audio_format": "flac",
    "thinking": True,
}


def described(kind: type[object]) -> dict[str, str]:
    """The text below each field of a class."""
    tree = ast.parse(generator.FILE.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    texts = {}
    for field, text in zip(found.body, found.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                texts[name] = said
    return texts


def owner_of(name: str) -> str:
    """The field that a key of the body sets."""
    return next((field for field, others in ALIASES.items() if name in others), name)


def test_the_fields_are_those_of_the_model_as_the_generator_writes_them() -> None:
    assert generator.with_fields() == generator.FILE.read_text(encoding="utf-8")
    assert [name for name in get_type_hints(RequestBody) if name in FIELDS] == list(FIELDS)


def test_a_lora_has_the_models_fields_and_descriptions() -> None:
    descriptions = {name: field.description for name, field in LoraChoice.model_fields.items()}
    assert described(LoraBody) == descriptions
    assert get_type_hints(LoraBody) == {"path": str, "scale": float, "alpha": float | None}


def test_what_is_no_field_is_an_alias_of_one_with_its_type_or_holds_fields() -> None:
    types, texts = get_type_hints(RequestBody), described(RequestBody)
    aliases = set(types) - set(FIELDS) - NESTED
    assert {"caption", "duration", "keyScale", "taskType"} <= aliases
    for alias in aliases:
        assert types[alias] == types[owner_of(alias)], alias
        assert texts[alias] == f"Alias of ``{owner_of(alias)}``."
    assert {types[name] for name in set(types) & NESTED} == {Mapping[str, object]}


def test_no_field_must_be_given() -> None:
    assert RequestBody.__required_keys__ == frozenset()
    assert LoraBody.__required_keys__ == {"path"}


def test_what_it_allows_is_read_without_a_warning() -> None:
    request, warnings = parse_request(FULL)
    assert warnings == ()
    assert (request.seed, request.timesteps, request.track_classes) == ((42,), (1.0, 0.5, 0.0), ("drums", "bass"))
    assert request.lora == LoraChoice(path="warm.safetensors", scale=0.5)
    assert request.loras == (LoraChoice(path="old"), LoraChoice(path="wide", scale=-1, alpha=16))


def test_the_aliases_are_read_without_a_warning() -> None:
    body: RequestBody = {"caption": "jazz", "duration": 30, "keyScale": "A minor", "taskType": "text2music"}
    request, warnings = parse_request({**body, "metas": {"bpm": 90}})
    assert warnings == ()
    assert (request.prompt, request.audio_duration, request.key_scale, request.bpm) == ("jazz", 30, "A minor", 90)
