# SPDX-License-Identifier: Apache-2.0
"""Single tasks: their manifests, and their progress as server-sent events."""

import asyncio
import json

import pytest

from acestep_consumer.gateway.result_folder import ResultFolder
from acestep_schemas.events import Unfinished, unfinished_event
from tests.support.gateway import KEY, completed, gateway, progress, repainted, settings_of, started, unfinished
from tests.support.waiting import WITHIN_S, eventually


async def test_a_task_is_shown_with_its_manifest_and_without_addresses_in_storage() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        data = (await served.get(f"/v1/jobs/{task_id}"))[1]["data"]
        assert (data["stage"], data["status"], data["manifest"]) == ("queued", 0, None)
        event = served.results.ends[task_id] = completed(task_id)
        await served.send(event)
        _, answer = await served.get(f"/v1/jobs/{task_id}")
        data = answer["data"]
        assert (data["stage"], data["status"]) == ("succeeded", 1)
        assert data["manifest"]["audios"][0]["file"] == data["result"][0]["file"]
        assert data["manifest"]["timings"]["total"] == 8.6
        assert "s3://" not in json.dumps(answer)
        served.results.ends["other"] = unfinished("rejected", "other")
        assert (await served.get("/v1/jobs/other"))[1]["data"]["manifest"]["error"]["code"] == "invalid_request"
        assert (await served.get("/v1/jobs/never"))[0] == 404


async def test_files_beside_a_song_are_told_by_the_address_to_fetch_them_from_and_never_by_that_in_storage() -> None:
    async with gateway() as served:
        event = served.results.ends["a"] = repainted("a")
        await served.send(event)
        _, answer = await served.get("/v1/jobs/a")
        (audio,), (item,) = answer["data"]["manifest"]["audios"], answer["data"]["result"]
        files = audio["files"]
        assert files["lrc"]["file"] == item["lrc"] == "/v1/audio?path=%2Fa%2F0.lrc"
        assert files["vtt"]["file"] == item["vtt"] == "/v1/audio?path=%2Fa%2F0.vtt"
        assert files["vtt"]["content_type"] == "text/vtt; charset=utf-8"
        # Workers find them by the task's id; here it is enough to know that they are kept.
        assert set(files["latents"]) == {"content_type", "bytes", "sha256"}
        assert (audio["lyrics"][1]["text"], audio["loudness"]["lufs"]) == ("last train leaves at nine", -14)
        async with served.http.get(f"{served.url}/v1/jobs/a/events") as stream:
            told = await stream.text()
        assert "0.lrc" in told
        for text in (json.dumps(answer), told):
            assert not any(address in text for address in ("s3://", "https://", "X-Amz"))


async def test_the_family_of_a_task_is_told_with_songs_to_fetch() -> None:
    async with gateway() as served:
        served.results.ends = {"order-4710": completed("order-4710"), "made": repainted("made")}
        status, answer = await served.get("/v1/jobs/order-4710/lineage")
        assert (status, answer["data"]["task_id"], answer["data"]["complete"]) == (200, "order-4710", True)
        first, made = answer["data"]["tasks"]
        assert (first["task_id"], first["task_type"], first["parents"]) == ("order-4710", "text2music", [])
        assert (made["task_id"], made["songs"]) == ("made", ["/v1/audio?path=%2Fmade%2F0.flac"])
        assert made["parents"] == [{"task_id": "order-4710", "index": 0, "field": "source_task_id"}]
        assert "s3://" not in json.dumps(answer)
        assert (await served.get("/v1/jobs/never/lineage"))[0] == 404
        served.results.away = True
        status, answer = await served.get("/v1/jobs/made/lineage")
        assert (status, answer["error"]) == (
            502,
            "the manifest cannot be read: the storage does not answer, or something else lies there",
        )
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        assert (await served.get("/v1/jobs/made/lineage"))[0] == 401


async def test_no_text_of_an_event_names_the_bucket_and_none_the_audio_that_others_sent() -> None:
    upload = "s3://acestep/jobs/uploads/first/src_audio_path.wav"
    edits = [
        {"field": name, "value": upload, "because": "the source of that song"}
        for name in ("src_audio_path", "reference_audio_path")
    ]
    missing = f"src_audio_path = {upload}: gone; s3://acestep: NoSuchBucket"
    async with gateway() as served:
        await served.send(repainted("made", edits=edits, warnings=[missing]))
        served.results.ends["made"] = repainted("made", edits=edits, warnings=[missing])
        failed = unfinished("failed", "lost").data
        assert isinstance(failed, Unfinished)
        error = failed.error.model_copy(update={"message": missing, "details": ({"value": upload},)})
        served.results.ends["lost"] = unfinished_event(failed.model_copy(update={"error": error}))
        for task_id in ("made", "lost"):
            shown = json.dumps([(await served.get(f"/v1/jobs/{task_id}"))[1], await served.query(task_id)])
            assert "s3://" not in shown
            assert "src_audio_path = /uploads/first/src_audio_path.wav: gone; the bucket: NoSuchBucket" in shown
        made = (await served.get("/v1/jobs/made"))[1]["data"]
        assert [made["manifest"]["edits"], made["result"][0].get("edits")] == [[], None]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://acestep/jobs/a/0.mp3", "/a/0.mp3"),
        ("at s3://acestep/jobs/uploads/a/b.wav: gone", "at /uploads/a/b.wav: gone"),
        ("s3://acestep/loras/jazz.safetensors", "s3://acestep/loras/jazz.safetensors"),
        ("s3://acestep/jobsite/a.wav", "s3://acestep/jobsite/a.wav"),
        ("s3://acestep-of-others/jobs/a.wav", "s3://acestep-of-others/jobs/a.wav"),
        ("s3://acestep.other/jobs/a.wav", "s3://acestep.other/jobs/a.wav"),
        ("s3://acestep: NoSuchBucket", "the bucket: NoSuchBucket"),
    ],
)
def test_only_the_folder_of_results_is_hidden(text: str, shown: str) -> None:
    folder = ResultFolder(settings_of().storage)
    assert folder.hide({"a": [text], "b": (1, None)}) == {"a": [shown], "b": [1, None]}


def test_without_a_prefix_the_whole_bucket_is_the_folder() -> None:
    folder = ResultFolder(settings_of(ACESTEP_S3_PREFIX="/").storage)
    assert folder.hide("s3://acestep/a/0.mp3") == "/a/0.mp3"


async def test_progress_is_streamed_until_the_end() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        async with asyncio.timeout(WITHIN_S), served.http.get(f"{served.url}/v1/jobs/{task_id}/events") as answer:
            assert answer.content_type == "text/event-stream"
            for event in (started(task_id), progress(task_id, 0.5), completed(task_id)):
                await eventually(lambda: served.gateway.tasks._open[task_id].waiters)
                await served.send(event)
            text = (await answer.read()).decode()
        events = [block.split("\n") for block in text.strip().split("\n\n")]
        assert [lines[0] for lines in events] == [
            "event: queued",
            "event: running",
            "event: running",
            "event: succeeded",
        ]
        assert json.loads(events[2][1].removeprefix("data: "))["progress"] == 0.5
        assert json.loads(events[3][1].removeprefix("data: "))["result"][0]["seed_value"] == "40"


async def test_streams_end_when_the_server_does() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        async with served.http.get(f"{served.url}/v1/jobs/{task_id}/events") as answer:
            await answer.content.readline()
            await eventually(lambda: served.gateway.tasks._open[task_id].waiters)
            await served.gateway._job_routes.close(served.gateway.application())
            async with asyncio.timeout(WITHIN_S):
                assert b"keep alive" not in await answer.read()
