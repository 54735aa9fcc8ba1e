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

_MAX_KEYS_SHOWN: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRequest:
    """The fields of a request. ``problem``: there are none; ``warnings``: where they were."""

    fields: Mapping[str, object]
    warnings: tuple[str, ...] = ()
    problem: FieldProblem | None = None


def open_envelope(body: Mapping[str, object]) -> FoundRequest:
    """Return the request in a body, which is in an envelope if the body itself has no field of a request."""
    if _has_fields(body):
        return FoundRequest(fields=body)
    inner = {name: part for name in ENVELOPES if isinstance(part := body.get(name), Mapping) and _has_fields(part)}
    if len(inner) != 1:
        return FoundRequest(fields=body, problem=_nothing_found(body, several=tuple(inner)))
    ((name, fields),) = inner.items()
    return FoundRequest(fields=fields, warnings=(f"the request was read from '{name}', the body's envelope",))


def _has_fields(fields: Mapping[str, object]) -> bool:
    return not field_names().isdisjoint(fields) or not _NESTED.isdisjoint(fields)


_NESTED: Final = frozenset({PARAM_OBJ, *METAS})


def _nothing_found(body: Mapping[str, object], several: tuple[str, ...]) -> FieldProblem:
    if several:
        rule = f"must hold one request, not one each in {' and '.join(several)}"
    else:
        rule = "must have a field of a request, such as prompt, or hold it in input, data or message"
    keys = ", ".join(shown(key) for key in list(body)[:_MAX_KEYS_SHOWN])
    return FieldProblem(field="body", value=f"an object with {shown(keys)}" if body else "an empty object", rule=rule)
