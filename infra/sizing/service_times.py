# SPDX-License-Identifier: Apache-2.0
"""Service times of jobs: measured by workers, or estimated by ``acestep-consumer plan``."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.sizing.arrivals import TraceUnreadableError


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Job times in seconds to sample from, and the concurrent jobs per worker (prefetch) that they hold for."""

    seconds: tuple[float, ...]
    in_hand: int
    rests_on: str

    def draw(self, count: int, seed: int) -> list[float]:
        """Sample ``count`` of them, so that rare long jobs are as rare as they were."""
        return random.Random(seed).choices(self.seconds, k=count)  # noqa: S311 - not for security


def read_measured(path: Path, in_hand: int) -> ServiceTimes:
    """Read job times: numbers, ``completed`` events or manifests, one per line; or a folder of manifests.

    Of events and manifests it is ``timings.total``, from taking the message to the job's end.

    Raises:
        TraceUnreadableError: it contains no job times.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    seconds = tuple(value for file in files for value in _seconds_in(file))
    if not seconds:
        raise TraceUnreadableError(
            f"{path} contains no job times: expected numbers, `completed` events or manifests, one per line"
        )
    return ServiceTimes(seconds, in_hand, f"{len(seconds)} measured jobs, {in_hand} concurrent")


def read_plan(path: Path) -> ServiceTimes:
    """Read the output of ``acestep-consumer plan --json``: a fully loaded worker with the recommended prefetch.

    Raises:
        TraceUnreadableError: it is not that, or has no estimate.
    """
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        songs_a_minute, in_hand = plan["songs"]["a_minute"], plan["workers"]["recommended"]
        batch, known = plan["workload"]["batch"], plan["card"]["compute"] is not None
    except (ValueError, KeyError, TypeError):
        raise TraceUnreadableError(f"{path} is not the output of `acestep-consumer plan --json`") from None
    if not songs_a_minute:
        raise TraceUnreadableError(f"{path} has no songs per minute; measure them, and use --measured")
    # The worker finishes a job every 60 / (songs per minute / batch) seconds, and runs in_hand of them concurrently.
    service_s = 60.0 * batch / songs_a_minute * in_hand
    basis = f"{songs_a_minute:g} songs per minute from `plan`, {in_hand} concurrent"
    if not known:
        basis += "; UNKNOWN GPU: that is an H200's speed, expect less"
    return ServiceTimes((service_s,), in_hand, basis)


def constant(seconds: float, in_hand: int) -> ServiceTimes:
    """Return the same time for every job."""
    return ServiceTimes((seconds,), in_hand, f"{seconds:g} s for every job, {in_hand} concurrent")


def _seconds_in(file: Path) -> Iterator[float]:
    text = file.read_text(encoding="utf-8")
    if not (documents := list(_documents(text))):
        raise TraceUnreadableError(f"{file} contains neither numbers nor JSON, one per line")
    for document in documents:
        seconds = _seconds_of(document)
        if seconds is not None and seconds > 0:
            yield seconds


def _documents(text: str) -> Iterator[Any]:
    """Yield the JSON documents of a file: one, or one per line; lines that are not JSON are skipped."""
    try:
        yield json.loads(text)
    except ValueError:
        for line in filter(None, map(str.strip, text.splitlines())):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _seconds_of(document: Any) -> float | None:
    """Return the seconds of a number, an event (whose manifest is in ``data``) or a manifest."""
    if isinstance(document, int | float) and not isinstance(document, bool):
        return float(document)
    if not isinstance(document, dict):
        return None
    manifest = document.get("data", document)
    timings = manifest.get("timings") if isinstance(manifest, dict) else None
    total = timings.get("total") if isinstance(timings, dict) else None
    return float(total) if isinstance(total, int | float) else None
