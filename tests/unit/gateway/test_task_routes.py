# SPDX-License-Identifier: Apache-2.0
"""``/release_task`` and ``/query_result`` over HTTP, with the shapes that were measured on ACE-Step's own server."""

import asyncio
import gzip
import io
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import mutagen
import numpy as np
import pytest

from acestep_consumer.audio.codec import encode
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.client import NoQueue, QueueFull, Unreachable
from acestep_consumer.gateway.task_ids import is_given_out
from acestep_schemas.events import Candidate, Edit, JobCompleted, ParentSong
from tests.support.gateway import (
    AUTHORIZED,
    KEY,
    FakeResults,
    completed,
    gateway,
    progress,
    repainted,
    started,
    unfinished,
)
from tests.support.waiting import WITHIN_S, eventually

ENVELOPE = {"data", "code", "error", "timestamp", "extra"}


async def test_a_request_becomes_a_message_and_gets_an_id_of_ours() -> None:
    async with gateway() as served:
        status, answer = await served.post("/release_task", {"prompt": "jazz", "task_id": "theirs", "lyrics": "la"})
        assert status == 200
        assert set(answer) == ENVELOPE
        assert (answer["code"], answer["error"], answer["extra"]) == (200, None, None)
        assert isinstance(answer["timestamp"], int)
        assert set(answer["data"]) == {"task_id", "status", "queue_position"}
        assert (answer["data"]["status"], answer["data"]["queue_position"]) == ("queued", 1)
        (message,) = served.client.published
        assert message == {
            "prompt": "jazz",
            "lyrics": "la",
            "batch_size": 2,
            "queue_deadline_s": 3600,
            "task_id": answer["data"]["task_id"],
        }
        assert is_given_out(message["task_id"])


@pytest.mark.parametrize(
    "fields",
    [
        {"task_type": "cover", "source_index": 1},
        {"extend_left_s": 10},
        {"extend_right_s": 30},
        {"replace_lines": {"old line": "new line"}},
        {"replace_lines": {"section": "verse 2", "lyrics": "new"}},
        {"variation": 0.3},
        {"stems": True},
        {"quality": "final"},
    ],
)
async def test_a_song_from_a_song_is_passed_on_as_it_is_and_is_one_song(fields: dict[str, Any]) -> None:
    async with gateway() as served:
        status, _ = await served.post("/release_task", {"source_task_id": "first", **fields})
        assert status == 200
        (message,) = served.client.published
        del message["task_id"], message["queue_deadline_s"]
        assert message == {"source_task_id": "first", **fields}


async def test_a_draft_is_passed_on_and_edits_that_contradict_each_other_are_400() -> None:
    async with gateway() as served:
        assert (await served.post("/release_task", {"prompt": "jazz", "quality": "draft"}))[0] == 200
        assert served.client.published[0]["quality"] == "draft"
        both = {"sourceTaskId": "first", "stems": True, "variation": 0.2}
        status, answer = await served.post("/release_task", both)
        assert status == 400
        assert "variation is given, too: make one song, then the other from it" in answer["detail"]


@pytest.mark.parametrize(
    ("content_type", "body", "fields"),
    [
        ("application/json", b'{"prompt": "a"}', {"prompt": "a"}),
        ("application/json; charset=utf-8", b'\xef\xbb\xbf{"prompt": "a"}', {"prompt": "a"}),
        ("application/vnd.api+json", b'{"prompt": "a"}', {"prompt": "a"}),
        ("application/x-www-form-urlencoded", b"prompt=a+b&seed=1&seed=2", {"prompt": "a b", "seed": ["1", "2"]}),
        ("application/x-www-form-urlencoded", b'{"prompt": "a=b"}', {"prompt": "a=b"}),
        ("text/plain", b'{"prompt": "a"}', {"prompt": "a"}),
        ("application/octet-stream", b"prompt=a", {"prompt": "a"}),
    ],
)
async def test_bodies_are_read_by_their_type_or_by_their_beginning(
    content_type: str, body: bytes, fields: dict[str, Any]
) -> None:
    async with gateway() as served:
        status, answer = await served.post("/release_task", data=body, headers={"Content-Type": content_type})
        assert status == 200, answer
        assert fields.items() <= served.client.published[0].items()


@pytest.mark.parametrize(
    ("content_type", "body", "status", "text"),
    [
        ("application/json", b"{", 400, "Malformed JSON payload"),
        ("application/json", b"[1]", 400, "JSON payload must be an object"),
        ("application/json", b"{}", 400, "must have a field of a request"),
        ("application/json", b'{"prompt": "a", "task_type": "polka"}', 400, "task_type"),
        ("text/plain", b"hello", 415, "text/plain"),
        ("multipart/form-data", b"x", 400, "Missing boundary in multipart."),
        ("multipart/form-data; boundary=x", b"nothing of that", 400, "Invalid multipart data."),
        ("application/json", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "bytes"),
    ],
)
async def test_bodies_that_cannot_be_read_are_refused_by_name(
    content_type: str, body: bytes, status: int, text: str
) -> None:
    async with gateway() as served:
        headers = {"Content-Type": content_type}
        found, answer = await served.post("/release_task", data=io.BytesIO(body), headers=headers)
        assert found == status, answer
        assert text in answer["detail"]
        assert answer["error"] == answer["detail"]
        assert served.client.published == []


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_is_read_or_refused(encoding: str) -> None:
    body = b'{"prompt": "a"}'
    packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    async with gateway() as served:
        assert (await served.post("/release_task", data=packed, headers=headers))[0] == 200
        async with served.http.post(f"{served.url}/release_task", data=b"nonsense", headers=headers) as answer:
            assert answer.status == 400


async def test_a_number_of_songs_and_a_deadline_that_are_given_stay() -> None:
    async with gateway() as served:
        await served.release({"prompt": "a", "param_obj": {"batch_size": 4, "queue_deadline_s": 60}})
        (message,) = served.client.published
        assert "batch_size" not in message
        assert "queue_deadline_s" not in message


async def test_no_candidates_leave_the_number_of_songs_to_the_settings() -> None:
    async with gateway() as served:
        await served.release({"prompt": "a", "candidates": 0})
        assert served.client.published[0]["batch_size"] == 2


async def test_candidates_take_the_place_of_the_number_of_songs() -> None:
    async with gateway() as served:
        await served.release({"prompt": "a", "candidates": "4", "keep": "2"})
        await served.release({"prompt": "a", "param_obj": {"best_of": 3}})
        first, second = served.client.published
        assert (first["candidates"], first["keep"]) == ("4", "2")
        assert "batch_size" not in first
        assert "batch_size" not in second


async def test_songs_that_were_chosen_have_their_scores_and_those_of_all_candidates() -> None:
    made = (
        Candidate(seed=7, score=0.4, kept=False, measures={"silence": 0.2}),
        Candidate(seed=8, score=0.9, kept=True, index=0, measures={"silence": 0.0}),
        Candidate(seed=9, score=0.7, kept=True, index=1, measures={"silence": 0.1}),
    )
    async with gateway() as served:
        task_id = await served.release({"prompt": "a", "candidates": 3, "keep": 2})
        await served.send(completed(task_id, songs=2, candidates=made, score_table="acestep-consumer-1"))
        items = json.loads((await served.query(task_id))[0]["result"])
        assert [item["score"] for item in items] == [0.9, 0.7]
        assert [each["score"] for each in items[0]["candidates"]] == [0.4, 0.9, 0.7]


async def test_no_key_is_published() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        nested = {"ai_token": KEY, "bpm": 90}
        await served.release({"prompt": "a", "ai_token": KEY, "param_obj": nested, "metas": json.dumps(nested)})
        await served.release({"data": {"prompt": "a", "ai_token": KEY}, "ai_token": KEY})
        assert KEY not in json.dumps(served.client.published)
        assert served.client.published[0]["param_obj"] == {"bpm": 90}


async def test_a_full_queue_is_429_and_says_when_to_try_again() -> None:
    async with gateway() as served:
        served.client.refusal = QueueFull(12.4)
        async with served.http.post(f"{served.url}/release_task", json={"prompt": "a"}) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "12")
            assert (await answer.json())["detail"] == "Server busy: queue is full"


@pytest.mark.parametrize("refusal", [NoQueue("no queue"), Unreachable("amqp://user:password@host")])
async def test_a_broker_out_of_reach_is_503_and_names_no_address(refusal: Exception) -> None:
    async with gateway() as served:
        served.client.refusal = refusal  # type: ignore[assignment]
        status, answer = await served.post("/release_task", {"prompt": "a"})
        assert status == 503
        assert "password" not in answer["detail"]
    async with gateway(connected=False) as served:
        assert (await served.post("/release_task", {"prompt": "a"}))[0] == 503
        assert (await served.get("/health"))[1]["data"]["status"] == "ok"
        assert (await served.get("/readyz"))[0] == 503


async def test_the_same_idempotency_key_is_the_same_task_at_every_replica() -> None:
    headers = {"Idempotency-Key": "order 7"}
    async with gateway() as one, gateway() as other:
        first = await one.release({"prompt": "a"}, headers=headers)
        assert await one.release({"prompt": "a"}, headers=headers) == first
        assert await other.release({"prompt": "a"}, headers=headers) == first
        assert await one.release({"prompt": "a", "task_id": "order 7"}) == first
        assert await one.release({"prompt": "a"}, headers={"Idempotency-Key": "order 8"}) != first
        assert len(one.client.published) == 2


async def test_a_task_goes_from_queued_over_running_to_its_songs() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "jazz"})
        (entry,) = await served.query(task_id)
        (item,) = json.loads(entry["result"])
        assert (entry["task_id"], entry["status"]) == (task_id, 0)
        assert set(item) >= {"file", "wave", "status", "create_time", "env", "prompt", "lyrics", "metas", "progress"}
        assert (item["stage"], item["progress"], item["file"]) == ("queued", 0.0, "")
        await served.send(started(task_id), progress(task_id, 0.62))
        (entry,) = await served.query(task_id)
        (item,) = json.loads(entry["result"])
        assert (entry["status"], item["progress"], item["stage"]) == (0, 0.62, "render 62%")
        await served.send(completed(task_id, songs=2))
        (entry,) = await served.query(task_id)
        assert entry["status"] == 1
        check_songs(task_id, json.loads(entry["result"]))
        assert served.results.reads == 0


def check_songs(task_id: str, items: list[dict[str, Any]]) -> None:
    """The items of two songs, field by field."""
    first, second = items
    assert first["file"] == first["url"] == f"/v1/audio?path=%2F{task_id}%2F0.mp3"
    assert second["file"].endswith("1.mp3")
    assert (first["wave"], first["status"], first["stage"], first["progress"]) == ("", 1, "succeeded", 1.0)
    assert (first["seed_value"], second["seed_value"]) == ("40", "41")
    assert (first["prompt"], first["lyrics"]) == ("jazz", "la la")
    assert first["metas"] == {
        "bpm": 72,
        "duration": 600,
        "genres": "N/A",
        "keyscale": "D minor",
        "timesignature": "4",
        "prompt": "jazz",
        "lyrics": "la la",
    }
    assert (first["dit_model"], first["lm_model"]) == ("acestep-v15-turbo", "acestep-5Hz-lm-1.7B")
    assert "**Total:** 8.60s" in first["generation_info"]


async def test_songs_from_songs_say_where_they_come_from_and_stems_which_track_they_are() -> None:
    async with gateway() as served:
        task_id = await served.release({"source_task_id": "first", "stems": True})
        parents = (ParentSong(task_id="first", index=0, field="stems"),)
        edits = (Edit(field="task_type", value="extract", because="stems"),)
        event = completed(task_id, songs=2, parents=parents, edits=edits)
        audios = tuple(
            audio.model_copy(update={"track": track})
            for audio, track in zip(event.data.audios, ("drums", "bass"), strict=True)
        )
        await served.send(JobCompleted.of(event.data.model_copy(update={"audios": audios})))
        (entry,) = await served.query(task_id)
        items = json.loads(entry["result"])
        assert [item["track"] for item in items] == ["drums", "bass"]
        assert items[0]["parents"] == [{"task_id": "first", "index": 0, "field": "stems"}]
        assert items[0]["edits"] == [{"field": "task_type", "value": "extract", "because": "stems"}]


@pytest.mark.parametrize("status", ["failed", "rejected", "cancelled", "expired"])
async def test_a_task_without_songs_is_failed_and_says_why(status: str) -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        await served.send(unfinished(status, task_id))
        (entry,) = await served.query(task_id)
        (item,) = json.loads(entry["result"])
        assert (entry["status"], item["status"], item["stage"], item["file"]) == (2, 2, "failed", "")
        assert item["error"] == entry["progress_text"]
        assert item["error"].startswith(f"{item['code']}: ")
        assert item["state"] == status


async def test_ids_come_back_as_they_were_sent_in_every_form_of_the_list() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        wanted = [task_id, "never", task_id, 7]
        entries = await served.query(*wanted)
        assert [entry["task_id"] for entry in entries] == wanted
        assert entries[1] == {"task_id": "never", "result": "[]", "status": 0}
        assert entries[0]["result"] != "[]"
        text = json.dumps([task_id])
        for body in ({"task_id_list": text}, {"task_id_list": [task_id]}):
            assert (await served.post("/query_result", body))[1]["data"][0]["task_id"] == task_id
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = await served.post("/query_result", data=urlencode({"task_id_list": text}), headers=form)
        assert answer[1]["data"][0]["task_id"] == task_id


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 200), ({"task_id_list": "no json"}, 200), ({"task_id_list": "7"}, 400), ([1], 400), (None, 200)],
)
async def test_a_list_that_is_none_is_empty_or_refused(body: object, status: int) -> None:
    async with gateway() as served:
        found, answer = await served.post("/query_result", body)
        assert found == status
        assert status != 200 or answer["data"] == []


async def test_any_replica_answers_for_any_task_also_after_a_restart() -> None:
    results = FakeResults()
    async with gateway(results=results) as one:
        waiting, ended = await one.release({"prompt": "a"}), await one.release({"prompt": "b"})
        results.ends[ended] = completed(ended)
    async with gateway(results=results) as other:
        first, second, third = await other.query(waiting, ended, "00000000-0000-4000-8000-000000000000")
        assert json.loads(first["result"])[0]["stage"] == "queued"
        assert json.loads(second["result"])[0]["stage"] == "succeeded"
        assert third["result"] == "[]"


async def test_storage_is_asked_rarely_and_once_for_all_who_ask_at_the_same_time() -> None:
    async with gateway() as served:
        await asyncio.gather(*(served.query("somebody-elses") for _ in range(50)))
        assert served.results.reads == 1
        task_id = await served.release({"prompt": "a"})
        await asyncio.gather(*(served.query(task_id) for _ in range(50)))
        assert served.results.reads == 1


async def test_a_client_may_wait_for_the_end() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        asking = asyncio.create_task(served.query(task_id, wait=30))
        await eventually(lambda: served.gateway.tasks._open[task_id].waiters)
        await served.send(started(task_id), completed(task_id))
        async with asyncio.timeout(WITHIN_S):
            assert (await asking)[0]["status"] == 1
        assert (await served.query(task_id, wait="soon"))[0]["status"] == 1


async def test_a_task_is_cancelled_by_either_route() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        task_id = await served.release({"prompt": "a"}, headers=AUTHORIZED)
        status, answer = await served.post("/cancel_task", {"task_id": task_id, "ai_token": KEY})
        assert (status, answer["data"]) == (200, {"task_id": task_id, "status": "cancelling"})
        async with served.http.delete(f"{served.url}/release_task/{task_id}", headers=AUTHORIZED) as deleted:
            assert deleted.status == 200
        assert served.client.cancelled == [task_id, task_id]
        assert (await served.post("/cancel_task", {"task_id": task_id}))[0] == 401
        assert (await served.post("/cancel_task", {"task_id": "never"}, headers=AUTHORIZED))[0] == 404
        await served.send(completed(task_id))
        status, answer = await served.post("/cancel_task", {"task_id": task_id}, headers=AUTHORIZED)
        assert answer["data"]["status"] == "succeeded"


async def test_an_analysis_is_one_plain_item() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a", "extract_codes_only": True})
        event = completed(task_id, songs=0)
        request = event.data.request.model_copy(update={"extract_codes_only": True})
        await served.send(event.model_copy(update={"data": event.data.model_copy(update={"request": request})}))
        (entry,) = await served.query(task_id)
        (item,) = json.loads(entry["result"])
        assert item["audio_codes"] == "<|audio_code_51023|><|audio_code_7344|><|audio_code_60101|>"
        assert not {"file", "status"} & set(item)


async def test_lyrics_with_times_tags_and_loudness_go_through_the_api(tmp_path: Path) -> None:
    asked = {"timestamps": True, "loudness_lufs": -14, "true_peak_db": -1.5}
    async with gateway() as served:
        task_id = await served.release({"prompt": "jazz", **asked})
        assert asked.items() <= served.client.published[0].items()
        song = tagged_song(tmp_path, task_id)
        audio = repainted(task_id).data.audios[0]
        uri = f"s3://acestep/jobs/{task_id}/0.mp3"
        place = {"uri": uri, "format": "mp3", "bytes": len(song)}
        served.results.stored[uri] = song
        await served.send(repainted(task_id, audios=[audio.model_copy(update=place)]))
        (entry,) = await served.query(task_id)
        (item,) = json.loads(entry["result"])
        assert entry["progress_text"] == "1 song"
        assert item["loudness"] == {"lufs": -14.0, "true_peak_db": -1.8}
        assert item["lyric_score"] == 0.7691
        assert [line["text"] for line in item["timestamps"]] == [line.text for line in audio.lyrics]
        assert item["timestamps"][1]["tokens"][0] == {"text": "last ", "start_s": 1.6, "end_s": 1.92}
        async with served.http.get(served.url + item["file"]) as answer:
            tags: Any = mutagen.File(io.BytesIO(await answer.read())).tags
        assert (tags["TIT2"].text, tags["TXXX:TASK_ID"].text) == (["jazz"], [task_id])
        assert tags.getall("SYLT")[0].text == [("last train leaves at nine", 1600)]


def tagged_song(folder: Path, task_id: str) -> bytes:
    """A second of silence as MP3, with the tags that a worker writes."""
    tags = (("title", "jazz"), ("syncedlyrics", "[00:01.60]last train leaves at nine"), ("task_id", task_id))
    silence = np.zeros((2, 48_000), np.float32)
    return encode(silence, folder / "song", replace(FORMATS["mp3"], tags=tags), 48_000).path.read_bytes()


async def test_a_trace_goes_on_through_the_message() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with gateway() as served:
        await served.release({"prompt": "a"}, headers={"traceparent": trace})
        await served.release({"prompt": "a"}, headers={"traceparent": "nonsense"})
        assert [each["traceparent"] for each in served.client.options] == [trace, None]
