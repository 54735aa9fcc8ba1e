# SPDX-License-Identifier: Apache-2.0
"""What a copied request holds, and what is sent to make another song like one."""

from typing import Any

import pytest

from acestep_consumer.domain import edits
from acestep_consumer.domain.edits import FoundSong
from acestep_consumer.webui.job_request import JobRequest
from acestep_schemas import examples
from acestep_schemas.events import Completed, Edit, ParentSong
from acestep_schemas.request import GenerationRequest, parse_request

CODES = (1, 20, 300)
TEXT = "<|audio_code_1|><|audio_code_20|><|audio_code_300|>"
DRAFT: dict[str, Any] = {"prompt": "slow jazz", "thinking": True, "quality": "draft", "batch_size": 2, "bpm": 90}


def read_from_an_event(request: GenerationRequest) -> GenerationRequest:
    """The request as it comes from an event, in which every field is given."""
    return GenerationRequest.model_validate(request.model_dump(mode="json"))


def song_of(body: dict[str, Any], **data: Any) -> FoundSong:
    request = read_from_an_event(parse_request(body)[0])
    changes = {"task_id": "first", "request": request, **data}
    manifest = Completed.model_validate(examples.completed().data.model_copy(update=changes).model_dump())
    return FoundSong(manifest, 0)


def made_from(song: FoundSong, field: str, **body: Any) -> JobRequest:
    """The job that a worker makes of a request which names the song."""
    asked = parse_request({"source_task_id": "first", **body})[0]
    found = edits.resolve(asked, song)
    parents = (ParentSong(task_id="first", index=0, field=field),)
    steps = Edit(field="inference_steps", value=8, because="quality = final, with a turbo model")
    noted = (*found.edits, steps) if asked.quality else found.edits
    return JobRequest(read_from_an_event(found.request), parents, noted)


def test_a_copy_has_the_codes_that_a_song_is_made_from() -> None:
    job = JobRequest(GenerationRequest(task_id="t", prompt="jazz", audio_code_string=TEXT, seed=(2**63 - 1,)))
    copied = {"prompt": "jazz", "audio_code_string": TEXT, "seed": "9223372036854775807"}
    assert job.whole(None) == copied
    assert parse_request(job.whole(None))[0].seed == (2**63 - 1,)
    assert job.another(None, None) == {"prompt": "jazz", "audio_code_string": TEXT}


def test_a_copy_of_a_final_song_makes_that_song_and_another_one_is_planned_anew_from_its_draft() -> None:
    draft = song_of(DRAFT | {"inference_steps": 4}, audio_codes=(CODES,))
    job = made_from(draft, "quality", quality="final", audio_format="flac")
    copied = job.whole(None)
    assert copied["audio_code_string"] == TEXT
    assert copied["seed"] == str(draft.audio.seed)
    assert job.draft == "first"
    again = job.another(None, JobRequest(draft.manifest.request))
    expected = {"prompt": "slow jazz", "thinking": True, "bpm": 90, "quality": "final", "audio_format": "flac"}
    assert again == expected


def test_another_final_song_is_planned_anew_also_where_its_draft_is_gone() -> None:
    job = made_from(song_of(DRAFT, audio_codes=(CODES,)), "quality", quality="final")
    again = job.another(None, None)
    assert (again["thinking"], again["quality"]) == (True, "final")
    assert not {"seed", "audio_code_string", "use_cot_metas", "use_cot_caption", "use_cot_language"} & set(again)
    without = made_from(song_of(DRAFT, audio_codes=()), "quality", quality="final").another(None, None)
    assert "thinking" not in without


def test_another_variation_is_asked_for_anew() -> None:
    song = song_of({"prompt": "jazz", "bpm": 90}, audio_codes=(CODES,))
    job = made_from(song, "variation", variation=0.25, audio_format="flac")
    assert job.whole(None)["audio_code_string"] == TEXT
    assert job.another(None, None) == {
        "source_task_id": "first",
        "source_index": 0,
        "variation": 0.25,
        "audio_format": "flac",
    }


@pytest.mark.parametrize("known_from", ["event", "page"])
def test_a_default_that_was_asked_for_is_kept_where_a_song_would_give_another_value(known_from: str) -> None:
    song = song_of({"prompt": "jazz", "audio_format": "flac", "guidance_scale": 7.0})
    body = {"audio_format": "mp3", "extend_right_s": 30}
    asked = JobRequest(parse_request({"source_task_id": "first", **body})[0])
    job = made_from(song, "extend_right_s", **body) if known_from == "event" else asked
    whole = job.whole(song.manifest.request)
    assert whole["audio_format"] == "mp3"
    assert "guidance_scale" not in whole
    assert job.another(song.manifest.request, None)["audio_format"] == "mp3"
    assert made_from(song, "extend_right_s", extend_right_s=30).whole(song.manifest.request)["audio_format"] == "flac"


def test_steps_that_were_asked_for_are_kept_beside_a_quality_that_has_others() -> None:
    job = JobRequest(parse_request({"prompt": "jazz", "quality": "draft", "inference_steps": 8})[0])
    assert job.whole(None)["inference_steps"] == 8
