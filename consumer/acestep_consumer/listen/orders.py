# SPDX-License-Identifier: Apache-2.0
"""What the form may send: a few fields of a request, checked before anything is published. Pure."""

from collections.abc import Mapping
from typing import Final
from uuid import uuid4

from acestep_schemas.request import FieldProblem, GenerationRequest, RequestInvalid, parse_request

FIELDS: Final = frozenset(
    {"task_id", "prompt", "lyrics", "audio_duration", "batch_size", "thinking", "audio_format", "model", "seed"}
)


def read_order(body: object) -> tuple[dict[str, object], GenerationRequest]:
    """Return the body to publish, with a task id, and the request that a worker will read from it.

    Raises:
        RequestInvalid: with every field that is wrong.
    """
    if not isinstance(body, Mapping):
        raise RequestInvalid((FieldProblem(field="body", value=type(body).__name__, rule="must be a JSON object"),))
    strange = sorted(str(name)[:100] for name in body if name not in FIELDS)
    if strange:
        raise RequestInvalid(
            tuple(FieldProblem(field=name, value="…", rule="is no field of this form") for name in strange[:10])
        )
    given = {name: value for name, value in body.items() if value not in (None, "")}
    request, _ = parse_request(given)
    if not request.prompt.strip():
        raise RequestInvalid((FieldProblem(field="prompt", value="", rule="must say what it should sound like"),))
    return {**given, "task_id": request.task_id or str(uuid4())}, request
