# SPDX-License-Identifier: Apache-2.0
"""Lyrics with times against those of the original ACE-Step 1.5: the attention, what is made of it, times and score."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from acestep_consumer.audio.time_warping import lyric_score, token_frames, warping_paths
from acestep_consumer.engine.renderer import encode_songs
from acestep_consumer.engine.renderer.lyrics import lyric_alignment
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import HeadSums, LyricTokens, Piece, lines_of
from acestep_consumer.engine.renderer.lyrics.lyric_files import lrc
from acestep_schemas.events import LyricLine
from tests.golden.compare import relative_error
from tests.golden.golden_data import GoldenCase, cases
from tests.golden.golden_worker import GoldenWorker

_FRAME_S = 0.08
_ATTENTION, _CONSENSUS = 3e-4, 1e-3


def params(kind: str) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases(lambda each: each == kind)]


def tokens_of(facts: dict[str, Any]) -> LyricTokens:
    """Return a case's tokens, each a piece of its own."""
    pieces = tuple(Piece(token["text"], index, index) for index, token in enumerate(facts["tokens"]))
    return LyricTokens(0, len(pieces), pieces)


def timed(lines: Iterable[LyricLine]) -> list[tuple[str, float, float]]:
    return [(line.text, line.start_s, line.end_s) for line in lines]


def theirs(sentences: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Return the original's lines, whose times are whole frames but for rounding."""
    return [(line["text"], round(line["start"], 3), round(line["end"], 3)) for line in sentences]


@pytest.mark.parametrize("case", params("align"))
def test_what_is_made_of_attention_equals_the_originals(case: GoldenCase) -> None:
    facts, arrays = case.facts, case.arrays
    tokens = tokens_of(facts)

    sums = HeadSums()
    for head in arrays["attention"]:
        sums.add(head[None])
    consensus, energy = sums.matrices()

    assert relative_error(consensus, arrays["calc"]) < 1e-6
    assert relative_error(energy, arrays["score_energy"]) < 1e-6
    path, path_of_energy = warping_paths(consensus.numpy(), energy.numpy() ** 2)
    assert path_of_energy.tolist() == arrays["path"].tolist()
    assert tokens.sung().tolist() == [bool(each) for each in facts["sung"]]
    assert round(lyric_score(energy.numpy(), path_of_energy, tokens.sung()), 4) == facts["score"]["lyrics_score"]
    frames = token_frames(path)
    assert (frames * _FRAME_S).ravel() == pytest.approx(
        [token[name] for token in facts["tokens"] for name in ("start", "end")]
    )
    lines = list(lines_of(tokens, (frames * _FRAME_S).tolist()))
    assert timed(lines) == theirs(facts["sentences"])
    assert lrc(lines) == facts["lrc"]


@contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """Record the attention of the heads, in order, and the matrices that it is reduced to."""
    found: dict[str, Any] = {"attention": []}
    add, align = HeadSums.add, lyric_alignment.align

    def recorded_add(self: HeadSums, attention: torch.Tensor) -> None:
        found["attention"].append(attention.clone())
        add(self, attention)

    def recorded_align(matrices: torch.Tensor, *rest: Any) -> Any:
        found["matrices"] = matrices.clone()
        found["aligned"] = align(matrices, *rest)
        return found["aligned"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadSums, "add", recorded_add)
        patch.setattr(encode_songs, "align", recorded_align)
        yield found


@pytest.mark.parametrize("case", params("lyric"))
def test_a_songs_lyrics_have_the_originals_times(case: GoldenCase, worker: GoldenWorker) -> None:
    facts = case.facts["lyric"]
    asking = replace(case, facts={**case.facts, "body": {**case.facts["body"], "timestamps": True}})

    with recorded() as found:
        made = worker.make(asking)

    assert made.rendering is not None
    (track,) = made.rendering.tracks
    if not case.facts["body"]["lyrics"]:
        assert track.lyrics == ()
        assert "timestamps had no effect: the song has no lyrics" in made.rendering.warnings
        return
    attention = torch.cat(found["attention"])
    assert attention.shape == case.arrays["lyric_attention"].shape
    assert relative_error(attention, case.arrays["lyric_attention"]) < _ATTENTION
    assert relative_error(found["matrices"][0], case.arrays["lyric_calc"]) < _CONSENSUS
    assert timed(track.lyrics) == theirs(facts["sentences"])
    assert track.lyric_score == pytest.approx(facts["score_of_song"], abs=1e-4)
    lrc_file = next(file for file in track.side_files if file.kind == "lrc")
    assert lrc_file.path.read_text(encoding="utf-8") == facts["lrc"] + "\n"
