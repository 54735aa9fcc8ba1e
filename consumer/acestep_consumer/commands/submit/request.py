# SPDX-License-Identifier: Apache-2.0
"""Builds a request from flags and a file, and checks it before it is sent.

The check is the worker's own reading of the body. A rejection would otherwise be an event that nobody listens to.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from acestep_consumer.domain import edits
from acestep_consumer.domain.errors import InvalidRequest
from acestep_consumer.domain.parse import form_document
from acestep_consumer.domain.tasks import TASKS
from acestep_consumer.policy.tiers import beyond_every_tier
from acestep_schemas.aliases import ALIASES
from acestep_schemas.request import FieldProblem, GenerationRequest, RequestInvalid, parse_request
from acestep_schemas.strict_json import JsonRefused

STDIN: Final = Path("-")

FLAGS: Final = {
    "task_id": "--task-id",
    "prompt": "--prompt",
    "lyrics": "--lyrics",
    "vocal_language": "--language",
    "audio_duration": "--duration",
    "bpm": "--bpm",
    "key_scale": "--key",
    "batch_size": "--batch-size",
    "candidates": "--candidates",
    "keep": "--keep",
    "audio_format": "--format",
    "model": "--model",
    "lora": "--lora",
    "loras": "--lora",
    "thinking": "--thinking",
    "timestamps": "--timestamps",
    "loudness_lufs": "--loudness",
    "true_peak_db": "--true-peak",
    "inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "seed": "--seed",
    "task_type": "--task-type",
    "src_audio_path": "--source",
    "reference_audio_path": "--reference",
    "source_task_id": "--from",
    "source_index": "--from-index",
    "extend_left_s": "--extend-left",
    "extend_right_s": "--extend-right",
    "replace_lines": "--replace-lines",
    "variation": "--variation",
    "stems": "--stems",
    "quality": "--quality",
    "on_limit": "--on-limit",
}
"""The flag of each field that has one."""

_OWNERS: Final = {alias: field for field, aliases in ALIASES.items() for alias in aliases}
_LORAS: Final = frozenset({"lora", "loras"})


class RequestRefused(Exception):
    """The request cannot be sent; ``str`` has one line for each problem."""


def merge(file: Mapping[str, object], flags: Mapping[str, object]) -> dict[str, object]:
    """Return the file's body with the flags that are not None on top, each in place of the field's other names too."""
    given = {field: value for field, value in flags.items() if value is not None}
    fields = {_OWNERS.get(name, name) for name in given}
    replaced = {name for field in fields for name in (field, *ALIASES.get(field, ()))}
    if not _LORAS.isdisjoint(given):
        replaced |= _LORAS
    return {name: value for name, value in file.items() if name not in replaced} | given


def assignments(texts: Sequence[str]) -> dict[str, object]:
    """Return the fields of ``--set``: ``name=value``, where the value is text, or a JSON object or list.

    Raises:
        RequestRefused: one has no name or no ``=``, or a name is set twice.
    """
    found: dict[str, object] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        name = name.strip()
        if not (name and mark):
            raise RequestRefused(f"--set {text}: must be name=value")
        if name in found:
            raise RequestRefused(f"--set {name} is given twice")
        found[name] = _structure(value)
    return found


def _structure(value: str) -> object:
    if not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value  # such as lyrics, which begin with [verse]


def line_fields(texts: Sequence[str]) -> dict[str, object]:
    """Return the field of ``--replace-lines``: each text is ``old line=new line``, or a JSON object of the field.

    Raises:
        RequestRefused: a text is neither, or a line is given twice.
    """
    found: dict[str, object] = {}
    for text in texts:
        old, mark, new = text.partition("=")
        structure = _structure(text)
        lines = structure if isinstance(structure, dict) else {old.strip(): new.strip()} if mark else {}
        if not lines or not all(lines):
            raise RequestRefused(
                f"--replace-lines {text}: must be 'old line=new line', or JSON such as "
                '{"section": "verse 2", "lyrics": "…"}'
            )
        if twice := found.keys() & lines.keys():
            raise RequestRefused(f"--replace-lines replaces {min(twice)!r} twice")
        found |= lines
    return {"replace_lines": found} if found else {}


def lora_fields(paths: Sequence[str], scales: Sequence[float]) -> dict[str, object]:
    """Return the fields of ``--lora`` and ``--lora-scale``: the first scale is that of the first LoRA, and so on.

    Raises:
        RequestRefused: more scales than LoRAs.
    """
    if len(scales) > len(paths):
        raise RequestRefused("--lora-scale needs --lora" if not paths else "there are more --lora-scale than --lora")
    loras = [{"path": path, "scale": scale} for path, scale in zip(paths, scales, strict=False)]
    several = [*loras, *paths[len(scales) :]]
    return {} if not several else {"lora": several[0]} if len(several) == 1 else {"loras": several}


def check(body: Mapping[str, object], from_flags: frozenset[str], *, strict: bool = False) -> tuple[str, ...]:
    """Check a body as a worker would; returns warnings, such as a guess at a misspelled field.

    Args:
        body: the request.
        from_flags: fields that a flag set: messages name the flag, and a wrong value is refused.
        strict: refuse all other wrong values too, in place of a warning that says which one a worker uses.

    Raises:
        RequestRefused: a worker would reject the request, or a flag has a wrong value.
    """
    try:
        request, warnings = parse_request(body, strict=True)
    except RequestInvalid as error:
        refused = error.problems if strict else [each for each in error.problems if each.field in from_flags]
        if refused:
            raise _refusal(refused, from_flags) from None
        request, warnings = _leniently(body, from_flags)
    task = TASKS[request.task_type]
    if task.lacks_source(request):
        field, value = ("task_type", task.name) if task.reads_source else ("flow_edit_morph", "true")
        raise RequestRefused(_problem(field, value, "needs source audio (--source)", from_flags))
    try:
        edits.check(request)
    except InvalidRequest as error:
        raise _refusal(error.problems, from_flags) from None
    beyond = beyond_every_tier(request)
    outside = tuple(_problem(each.field, each.value, each.rule, from_flags) for each in beyond)
    if not outside:
        return warnings
    if "on_limit" in body and request.on_limit == "clamp":
        return (*warnings, *(f"{problem}; the worker will adjust it" for problem in outside))
    raise RequestRefused("\n".join(f"{problem} (--on-limit clamp lets the worker adjust it)" for problem in outside))


def _leniently(body: Mapping[str, object], from_flags: frozenset[str]) -> tuple[GenerationRequest, tuple[str, ...]]:
    try:
        return parse_request(body)
    except RequestInvalid as error:
        raise _refusal(error.problems, from_flags) from None


def _refusal(problems: Iterable[FieldProblem], from_flags: frozenset[str]) -> RequestRefused:
    return RequestRefused("\n".join(_problem(each.field, each.value, each.rule, from_flags) for each in problems))


def _problem(field: str, value: str, rule: str, from_flags: frozenset[str]) -> str:
    return f"{FLAGS[field]} {value}: {rule}" if field in from_flags else f"{field} = {value}: {rule}"


def read_form(file: Path) -> dict[str, object]:
    """Read a request from a file that holds a form, as browsers send it. Raises ``RequestRefused``."""
    try:
        return form_document(read_text(file).strip()).fields
    except JsonRefused as error:
        raise RequestRefused(f"{file}: {error}") from error


def read_json(file: Path) -> dict[str, object]:
    """Read a request from a JSON file, or from standard input (``-``). Raises ``RequestRefused``."""
    text = read_text(file)
    try:
        body = json.loads(text)
    except ValueError as error:
        raise RequestRefused(f"{file} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestRefused(f"{file} contains a {type(body).__name__}; a request is a JSON object")
    return body


def read_text(file: Path) -> str:
    """Read a file in UTF-8, or standard input (``-``). Raises ``RequestRefused``."""
    try:
        return sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestRefused(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestRefused(f"{file} is not UTF-8 text") from error
