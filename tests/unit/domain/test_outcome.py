# SPDX-License-Identifier: Apache-2.0
"""The manifest: what it gathers from the stages, where only some of the songs were kept."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.job import Plan, Rendering, StoredObject, Track
from acestep_consumer.domain.outcome import RunInfo, manifest
from acestep_schemas.events import Candidate, Completed, Metas, Timings, parse_manifest
from tests.support.admission import admitted_job

CANDIDATES = (
    Candidate(seed=7, score=0.8, kept=True, index=1, measures={"silence": 0.1}),
    Candidate(seed=8, score=None, kept=False),
    Candidate(seed=9, score=0.9, kept=True, index=0, measures={"silence": 0.0}),
)


def made(candidates: tuple[Candidate, ...], codes: tuple[str, ...]) -> Completed:
    job = admitted_job(candidates=3, keep=2, seed=[7, 8, 9])
    tracks = tuple(
        Track(
            path=Path(f"{index}.mp3"),
            seed=seed,
            format="mp3",
            content_type="audio/mpeg",
            sample_rate=48_000,
            channels=2,
            duration_s=10,
        )
        for index, seed in enumerate((9, 7))
    )
    rendering = Rendering(tracks=tracks, render_s=1, encode_s=1, candidates=candidates, score_table="scores-1")
    objects = tuple(
        StoredObject(track=each, uri=f"s3://a/{each.path}", url=None, bytes=1, sha256="") for each in tracks
    )
    info = RunInfo(worker_id="w", attempt=1, now=datetime.now(UTC))
    return manifest(job, Plan(metas=Metas(), audio_codes=codes), rendering, objects, Timings(), info)


def test_audio_codes_are_those_of_the_songs_that_are_kept_in_their_order() -> None:
    found = made(CANDIDATES, tuple(format_codes([number]) for number in (70, 80, 90)))
    assert [each.seed for each in found.audios] == [9, 7]
    assert found.audio_codes == ((90,), (70,))


@pytest.mark.parametrize("codes", [(), (format_codes([1]),)])
def test_codes_that_all_songs_share_stay_as_they_are(codes: tuple[str, ...]) -> None:
    assert len(made(CANDIDATES, codes).audio_codes) == len(codes)


def test_all_candidates_and_the_table_are_in_the_manifest() -> None:
    found = made(CANDIDATES, ())
    assert (found.candidates, found.score_table) == (CANDIDATES, "scores-1")
    assert parse_manifest(found.model_dump_json().encode()) == found
