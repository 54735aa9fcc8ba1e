# SPDX-License-Identifier: Apache-2.0
"""How long requests take a place: from what workers measured, or from what ``acestep-consumer plan`` expects."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.sizing.arrivals import TraceUnreadableError


@dataclass(frozen=True, slots=True)
class Services:
    """Seconds of jobs to draw from, and how many jobs a worker had in hand while they were measured."""

    seconds: tuple[float, ...]
    in_hand: int
    rests_on: str

    def draw(self, count: int, seed: int) -> list[float]:
        """Return ``count`` of them at random, so that a rare long one comes as often as it did."""
        return random.Random(seed).choices(self.seconds, k=count)  # noqa: S311 - no secret


def read_measured(path: Path, in_hand: int) -> Services:
    """Read what jobs took: numbers one a line, ``completed`` events or manifests one a line, or a folder of manifests.

    Of events and manifests it is ``timings.total``, from a worker's taking the message to its end.

    Raises:
        TraceUnreadableError: nothing in it says how long a job took.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    seconds = tuple(value for file in files for value in _seconds_in(file))
    if not seconds:
        raise TraceUnreadableError(
            f"{path} says of no job how long it took: numbers, `completed` events or manifests are expected, one a line"
        )
    return Services(seconds, in_hand, f"{len(seconds)} measured jobs, {in_hand} in hand")


def read_plan(path: Path) -> Services:
    """Read the answer of ``acestep-consumer plan --json``: a worker that is full, with the number in hand it proposes.

    Raises:
        TraceUnreadableError: it is none, or it expects nothing.
    """
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        songs_a_minute, in_hand = plan["songs"]["a_minute"], plan["workers"]["recommended"]
        batch = plan["workload"]["batch"]
    except (ValueError, KeyError, TypeError):
        raise TraceUnreadableError(f"{path} is no answer of `acestep-consumer plan --json`") from None
    if not songs_a_minute:
        raise TraceUnreadableError(f"{path}: this card's songs a minute are not known; measure, and give --measured")
    # A full worker ends so many jobs a minute; each of those in hand takes as many times longer.
    takes_s = 60.0 * batch / songs_a_minute * in_hand
    return Services((takes_s,), in_hand, f"{songs_a_minute:g} songs a minute from `plan`, {in_hand} in hand")


def constant(seconds: float, in_hand: int) -> Services:
    """Return jobs that all take the same."""
    return Services((seconds,), in_hand, f"{seconds:g} s for every job, {in_hand} in hand")


def _seconds_in(file: Path) -> Iterator[float]:
    text = file.read_text(encoding="utf-8")
    if not (documents := list(_documents(text))):
        raise TraceUnreadableError(f"{file} is neither numbers nor JSON, one a line")
    for document in documents:
        seconds = _seconds_of(document)
        if seconds is not None and seconds > 0:
            yield seconds


def _documents(text: str) -> Iterator[Any]:
    """The file as one JSON document, or one a line; what is neither is no document."""
    try:
        yield json.loads(text)
    except ValueError:
        for line in filter(None, map(str.strip, text.splitlines())):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _seconds_of(document: Any) -> float | None:
    """A number is seconds; an event has the manifest in ``data``, and a manifest its timings."""
    if isinstance(document, int | float) and not isinstance(document, bool):
        return float(document)
    if not isinstance(document, dict):
        return None
    manifest = document.get("data", document)
    timings = manifest.get("timings") if isinstance(manifest, dict) else None
    total = timings.get("total") if isinstance(timings, dict) else None
    return float(total) if isinstance(total, int | float) else None
