# SPDX-License-Identifier: Apache-2.0
"""Finds the request in a body: the body itself, or the one well-known envelope in it that holds a request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from acestep_schemas.aliases import METAS, PARAM_OBJ
from acestep_schemas.lookup import shown
from acestep_schemas.request import FieldProblem, field_names

ENVELOPES: Final = ("input", "data", "message")
"""Keys of serverless workers, of CloudEvents in structured mode, and of MassTransit."""

# Fields that say nothing of the music: these count beside an envelope too.
_OF_THE_MESSAGE: Final = frozenset(
    {"task_id", "model", "strict", "on_limit", "on_model_unavailable", "queue_deadline_s"}
)
# Names that may stand beside an envelope and mean something else there.
_AMBIGUOUS: Final = frozenset({"key", "format", "description", "desc", "language"})

_MAX_KEYS_SHOWN: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRequest:
    """The fields of a request. ``problem``: there are none; ``warnings``: where they were."""

    fields: Mapping[str, object]
    warnings: tuple[str, ...] = ()
    problem: FieldProblem | None = None


def open_envelope(body: Mapping[str, object]) -> FoundRequest:
    """Return the request in a body, which is in an envelope if the body itself asks for nothing.

    An id or another field about the message may stand beside the envelope, and counts.
    """
    asked = _asked(body)
    if asked - _AMBIGUOUS:
        return FoundRequest(fields=body)
    inner = {name: part for name in ENVELOPES if isinstance(part := body.get(name), Mapping) and _asked(part)}
    if len(inner) != 1:
        problem = None if asked and not inner else _nothing_found(body, several=tuple(inner))
        return FoundRequest(fields=body, problem=problem)
    ((name, fields),) = inner.items()
    beside = {key: body[key] for key in body if key in _OF_THE_MESSAGE}
    ignored = ", ".join(repr(key) for key in body if key in asked and key not in beside)
    warning = f"the request was read from '{name}', the body's envelope"
    warning += f"; {ignored} beside it is ignored" if ignored else ""
    return FoundRequest(fields={**beside, **fields}, warnings=(warning,))


def _asked(fields: Mapping[str, object]) -> frozenset[str]:
    """Return the names in an object that ask for something: fields of a request, and nested objects of them."""
    nested = {name for name in _NESTED.intersection(fields) if _holds_fields(fields[name])}
    return (field_names().intersection(fields) - _OF_THE_MESSAGE) | nested


def _holds_fields(part: object) -> bool:
    if isinstance(part, Mapping):
        return not field_names().isdisjoint(part)
    return isinstance(part, str) and bool(part.strip())


_NESTED: Final = frozenset({PARAM_OBJ, *METAS})


def _nothing_found(body: Mapping[str, object], several: tuple[str, ...]) -> FieldProblem:
    if several:
        rule = f"must hold one request, not one each in {' and '.join(several)}"
    else:
        rule = "must have a field of a request, such as prompt, or hold it in input, data or message"
    keys = ", ".join(shown(key) for key in list(body)[:_MAX_KEYS_SHOWN])
    return FieldProblem(field="body", value=f"an object with {shown(keys)}" if body else "an empty object", rule=rule)
