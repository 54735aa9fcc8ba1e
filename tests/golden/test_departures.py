# SPDX-License-Identifier: Apache-2.0
"""Songs that differ from those of the original ACE-Step on purpose: what is equal all the same, and what is not."""

from dataclasses import replace

import pytest
import soundfile
import torch

from tests.golden import departures
from tests.golden.compare import AUDIO, LATENTS, differences, relative_error
from tests.golden.golden_data import GoldenCase, need, songs
from tests.golden.golden_worker import GoldenWorker, Made

RATE = 48_000
CASES = {case.name: case for case in songs()}


def other_than_audio(made: Made, case: GoldenCase) -> list[str]:
    return [line for line in differences(made, case) if not line.startswith("audio ")]


def weights_of_the_new_part(case: GoldenCase, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the source as it is extended, and the weight of the new part of each sample, as the facts say."""
    effective = case.facts["effective"]
    start, end = (round(effective[f"repainting_{name}"] * RATE) for name in ("start", "end"))
    before = max(-start, 0)
    end = source.shape[1] if end < 0 else end
    source = torch.nn.functional.pad(source, (before, max(end - source.shape[1], 0)))
    start, end = start + before, end + before
    free = {"conservative": 0.0, "balanced": effective["repaint_strength"]}[effective["repaint_mode"]]
    fade = int(0.05 * (1 - free) * RATE)
    ramp = torch.linspace(0, 1, fade + 2)[1:-1]
    weights = torch.zeros(source.shape[1])
    weights[start:end] = 1
    if start:
        weights[start - fade : start] = ramp
    if end < len(weights):
        weights[end : end + fade] = ramp.flip(0)
    return source, weights


@pytest.mark.parametrize("name", departures.KEPT_AT_THEIR_LEVEL)
def test_only_the_new_part_of_a_repainted_song_is_scaled(name: str, worker: GoldenWorker) -> None:
    case = CASES[name]
    made = worker.make(case)
    assert other_than_audio(made, case) == []
    read = soundfile.read(need(case.facts["body"]["src_audio_path"]), dtype="float32")[0].T
    source, weights = weights_of_the_new_part(case, torch.from_numpy(read))
    (song,) = made.audio
    assert song.shape == source.shape
    assert torch.equal(song[:, weights == 0], source[:, weights == 0])
    for index, (start, end) in enumerate(case.facts["audio"]["slices"]):
        golden, kept = case.arrays[f"audio_{index}"], (1 - weights[start:end]) * source[:, start:end]
        # The original's factor for all of the song, seen where all is kept: there the source became golden.
        assert relative_error(song[:, start:end] - kept, golden - _factor(case, source, weights) * kept) < AUDIO


def _factor(case: GoldenCase, source: torch.Tensor, weights: torch.Tensor) -> float:
    for index, (start, end) in enumerate(case.facts["audio"]["slices"]):
        outside = weights[start:end] == 0
        loud, golden = source[:, start:end][:, outside], case.arrays[f"audio_{index}"][:, outside]
        if loud.abs().sum() > 0:
            return float((loud.double() * golden).sum() / loud.double().square().sum())
    raise AssertionError("no slice holds samples of the source")


def test_a_window_that_ends_before_it_starts_is_the_whole_song(worker: GoldenWorker) -> None:
    whole = CASES["repaint_turbo_whole"]
    assert list(differences(worker.make(CASES[departures.END_BEFORE_START]), whole)) == []


@pytest.mark.parametrize(("name", "seconds"), departures.NAMED_LENGTHS.items())
def test_the_prompt_names_the_length_of_the_codes(name: str, seconds: int, worker: GoldenWorker) -> None:
    case = CASES[name]
    text = case.facts["text_prompt"]
    assert "- duration: 30 seconds" in text
    ours = text.replace("- duration: 30 seconds", f"- duration: {seconds} seconds")
    made = worker.make(replace(case, facts={**case.facts, "text_prompt": ours}))
    assert [line.partition(" ")[0] for line in differences(made, case)] == ["texts", "latents"]
    assert made.texts == [(ours, case.facts["lyric_prompt"])]
    assert [song.shape[1] for song in made.audio] == [seconds * RATE]


def test_a_song_of_less_than_five_seconds_has_the_length_that_was_asked_for(worker: GoldenWorker) -> None:
    """The model works on 128 frames, here and there; the original also returns them."""
    case = CASES["t2m_turbo_short3"]
    made = worker.make(case)
    assert len(made.latents[0]) == 128
    assert [song.shape[1] for song in made.audio] == [3 * RATE]


def test_each_song_of_a_batch_has_the_reference_that_it_has_alone(worker: GoldenWorker) -> None:
    case = CASES[departures.OWN_POSTERIORS]
    first, second = worker.make(case).latents
    assert relative_error(first, case.arrays["latents"][0]) < LATENTS
    alone = worker.make(replace(case, facts={**case.facts, "body": {**case.facts["body"], "seed": 8, "batch_size": 1}}))
    assert relative_error(second, alone.latents[0]) < LATENTS
    assert relative_error(second, case.arrays["latents"][1]) > LATENTS


def test_every_departure_is_a_case() -> None:
    assert set(CASES) >= departures.DEPARTURES
