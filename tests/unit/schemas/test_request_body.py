# SPDX-License-Identifier: Apache-2.0
"""The `TypedDict` of a request says what the model says, so that they cannot drift apart."""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Required, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from acestep_schemas import request_body
from acestep_schemas.aliases import ALIASES, METAS, PARAM_OBJ
from acestep_schemas.request import GenerationRequest, LoraChoice, parse_request
from acestep_schemas.request_body import LoraBody, RequestBody

FIELDS = GenerationRequest.model_fields
NESTED = {PARAM_OBJ, *METAS}
# What a field may hold besides what the model makes of it.
LOOSER = {
    "seed": int | Sequence[int],
    "lora": LoraBody | str | None,
    "loras": Sequence[LoraBody | str],
    "audio_code_string": str | Sequence[str],
}
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


def plain(kind: Any) -> Any:
    """A model's type as a producer writes it: without bounds, and any sequence in place of a tuple."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated or origin is Required:
        return plain(parts[0])
    if origin is tuple:
        return Sequence[plain(parts[0])]  # type: ignore[misc]  # built from another type on purpose
    if origin is Union or origin is UnionType:
        return Union[tuple(map(plain, parts))]  # noqa: UP007 - the parts are known at run time only
    return kind


def described(kind: type[object]) -> dict[str, str]:
    """The text below each field of a class."""
    tree = ast.parse(Path(request_body.__file__).read_text(encoding="utf-8"))
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


@pytest.mark.parametrize(("body", "model"), [(RequestBody, GenerationRequest), (LoraBody, LoraChoice)])
def test_every_field_has_the_models_type_and_description_in_the_models_order(
    body: type[object], model: type[BaseModel]
) -> None:
    types, texts = get_type_hints(body), described(body)
    assert [name for name in types if name in model.model_fields] == list(model.model_fields)
    for name, field in model.model_fields.items():
        assert types[name] == LOOSER.get(name, plain(field.annotation)), name
        assert texts[name] == field.description, name


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


def test_a_models_type_is_compared_as_a_producer_writes_it() -> None:
    assert plain(FIELDS["seed"].annotation) == Sequence[int]
    assert plain(FIELDS["time_signature"].annotation) == str | None
