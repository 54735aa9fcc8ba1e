# SPDX-License-Identifier: Apache-2.0
"""Builds a request from flags and a JSON file, and checks it before it is sent.

The check is the worker's own reading of the body. A rejection would otherwise be an event that nobody listens to.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from acestep_consumer.domain.tasks import TASKS
from acestep_consumer.policy.tiers import MAX_BATCH, MAX_BPM, MAX_DURATION_S, MIN_BPM
from acestep_schemas.aliases import ALIASES
from acestep_schemas.request import GenerationRequest, RequestInvalid, parse_request

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
    "audio_format": "--format",
    "model": "--model",
    "lora": "--lora",
    "thinking": "--thinking",
    "inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "seed": "--seed",
    "task_type": "--task-type",
    "src_audio_path": "--source",
    "reference_audio_path": "--reference",
    "on_limit": "--on-limit",
}
"""The flag of each field that has one."""

# What the largest tier allows. A tier table of one's own cannot allow more.
_BOUNDS: Final = (
    ("audio_duration", 0, MAX_DURATION_S),
    ("batch_size", 1, MAX_BATCH),
    ("bpm", MIN_BPM, MAX_BPM),
)


class RequestRefused(Exception):
    """The request cannot be sent; ``str`` has one line for each problem."""


def merge(file: Mapping[str, object], flags: Mapping[str, object]) -> dict[str, object]:
    """Return the file's body with the flags that are not None on top, each in place of the field's aliases too."""
    given = {field: value for field, value in flags.items() if value is not None}
    replaced = {alias for field in given for alias in ALIASES.get(field, ())}
    return {name: value for name, value in file.items() if name not in replaced} | given


def check(body: Mapping[str, object], from_flags: frozenset[str]) -> tuple[str, ...]:
    """Check a body as a strict worker would; returns warnings, such as a guess at a misspelled field.

    Args:
        body: the request.
        from_flags: fields that a flag set: messages name the flag.

    Raises:
        RequestRefused: a strict worker would reject the request; by default one replaces a wrong value.
    """
    try:
        request, warnings = parse_request(body, strict=True)
    except RequestInvalid as error:
        lines = (_problem(each.field, each.value, each.rule, from_flags) for each in error.problems)
        raise RequestRefused("\n".join(lines)) from None
    if TASKS[request.task_type].lacks_source(request):
        raise RequestRefused(_problem("task_type", request.task_type, "needs source audio (--source)", from_flags))
    outside = tuple(_outside_bounds(request, from_flags))
    if not outside:
        return warnings
    if "on_limit" in body and request.on_limit == "clamp":
        return (*warnings, *(f"{problem}; the worker will adjust it" for problem in outside))
    raise RequestRefused("\n".join(f"{problem} (--on-limit clamp lets the worker adjust it)" for problem in outside))


def _outside_bounds(request: GenerationRequest, from_flags: frozenset[str]) -> Iterator[str]:
    for field, least, most in _BOUNDS:
        value = getattr(request, field)
        if value is not None and not least <= value <= most:
            yield _problem(field, f"{value:g}", f"must be {least} to {most}", from_flags)


def _problem(field: str, value: str, rule: str, from_flags: frozenset[str]) -> str:
    return f"{FLAGS[field]} {value}: {rule}" if field in from_flags else f"{field} = {value}: {rule}"


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
