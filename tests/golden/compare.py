# SPDX-License-Identifier: Apache-2.0
"""Comparison of a song with a golden case, within the limits of ``../shared/golden/TOLERANCE.md``."""

from collections.abc import Iterator
from itertools import groupby

import torch

from tests.golden.golden_data import GoldenCase
from tests.golden.golden_worker import Made

LATENTS, SHARP_LATENTS, AUDIO, CONTEXT = 1e-5, 1e-4, 1e-5, 1e-6
_TIME = 1e-5


def differences(made: Made, case: GoldenCase) -> Iterator[str]:
    """Yield a line for everything in which the songs differ from the case."""
    facts, arrays = case.facts, case.arrays
    expected = [(facts["text_prompt"], facts["lyric_prompt"])]
    if (after := facts.get("text_prompt_after_the_switch")) is not None:
        expected.append((after, facts["lyric_prompt"]))
    if "flow_edit_source_text_prompt" in facts:
        expected.append((facts["flow_edit_source_text_prompt"], facts["flow_edit_source_lyric_prompt"]))
    if made.texts != expected:
        yield f"texts {made.texts} are not {expected}"
    yield from _passes(made, case)
    if "context" in arrays:
        yield from _beyond("context", made.context, arrays["context"], CONTEXT)
    limit = SHARP_LATENTS if case.name.startswith("lyric_sharp") else LATENTS
    yield from _beyond("latents", made.latents, arrays["latents"], limit)
    yield from _audio(made, case)


def _passes(made: Made, case: GoldenCase) -> Iterator[str]:
    """Compare branches by flow time. Passes at one time may be one pass here (flow edit)."""
    guided = case.facts["effective"]["guidance_scale"] > 1 and "turbo" not in case.model
    ours, theirs = _by_time(made.passes), _by_time([(time, rows) for time, rows in case.facts["passes"]])
    body = case.facts["body"]
    start, end = body.get("cfg_interval_start", 0.0), body.get("cfg_interval_end", 1.0)
    # Outside the guidance interval the original computes the unguided branch too, and drops it.
    wanted = [(time, rows if not guided or start <= time <= end else rows // 2) for time, rows in theirs]
    same = len(ours) == len(wanted) and all(
        abs(mine[0] - other[0]) <= _TIME and mine[1] == other[1] for mine, other in zip(ours, wanted, strict=True)
    )
    if not same:
        yield f"passes {[(round(time, 6), rows) for time, rows in ours]} are not {wanted}"


def _by_time(passes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Add up the branches of successive passes at one time."""
    return [(time, sum(rows for _, rows in some)) for time, some in groupby(passes, key=lambda one: round(one[0], 5))]


def _beyond(name: str, ours: list[torch.Tensor], theirs: torch.Tensor, limit: float) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield f"{name}: {len(ours)} songs, not {len(theirs)}"
        return
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.shape != other.shape:
            yield f"{name} of song {index}: shape {tuple(mine.shape)} is not {tuple(other.shape)}"
        elif not (error := relative_error(mine, other)) <= limit:
            yield f"{name} of song {index}: relative error {error:.2e} is above {limit:g}"


def relative_error(mine: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the golden one."""
    return float((mine - other).norm() / other.norm().clamp(min=1e-12))


def _audio(made: Made, case: GoldenCase) -> Iterator[str]:
    golden = case.facts.get("audio")
    if golden is None:
        return
    song = made.audio[0]
    if song.shape[1] != golden["samples"]:
        yield f"audio: {song.shape[1]} samples, not {golden['samples']}"
        return
    for index, (start, end) in enumerate(golden["slices"]):
        error = relative_error(song[:, start:end], case.arrays[f"audio_{index}"])
        if not error <= AUDIO:
            yield f"audio {start}..{end}: relative error {error:.2e} is above {AUDIO:g}"
