# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end: a real worker, broker, S3 server and pipeline; the model alone is tiny and random."""

import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import boto3
import mutagen
import pytest

from acestep_consumer.client import Client
from acestep_consumer.execution.scratch import OWNER
from acestep_consumer.policy.scoring import BUILT_IN, KNOWN
from acestep_schemas.events import (
    MAX_PEAKS,
    JobCompleted,
    JobEvent,
    JobStarted,
    TerminalEvent,
    Unfinished,
    WorkerEvent,
)
from infra.local.s3 import SeaweedFS
from tests.support.broker import Peer
from tests.support.command import run_command
from tests.support.engine_double import write_song
from tests.support.waiting import WITHIN_S
from tests.support.worker import WorkerProcess

ENDS_WITHIN_S = WITHIN_S


@dataclass
class Producer:
    """Sends requests to the worker under test and hears how they end."""

    client: Client
    url: str

    async def sing(self, **fields: object) -> list[JobEvent]:
        """All events of one request, the terminal one last."""
        task_id = str(fields.get("task_id") or uuid.uuid4().hex)
        return await self.send(task_id, json.dumps({"prompt": "jazz", "task_id": task_id, **fields}).encode())

    async def send(self, task_id: str, body: bytes) -> list[JobEvent]:
        """Publish these bytes and collect the events of ``task_id``."""
        heard: list[JobEvent] = []
        async with (
            asyncio.timeout(ENDS_WITHIN_S),
            Peer(self.url) as peer,
            self.client.subscribe(f"job.*.{task_id}") as events,
        ):
            await peer.request(body, message_id=task_id)
            async for event in events:
                assert not isinstance(event, WorkerEvent)
                heard.append(event)
                if heard[-1].terminal:
                    return heard
        raise AssertionError("the stream of events ended")

    async def dead_letter(self, task_id: str) -> Any:
        """Take messages from the dead-letter queue until this task's comes."""
        async with asyncio.timeout(WITHIN_S), Peer(self.url) as peer:
            while (message := await peer.take("acestep.dead-letter")).message_id != task_id:
                pass
            return message


@pytest.fixture
async def producer(worker: WorkerProcess, worker_environment: dict[str, str]) -> AsyncIterator[Producer]:
    url = worker_environment["ACESTEP_AMQP_URL"]
    async with Client(url) as client:
        yield Producer(client, url)


@pytest.fixture(scope="module")
def bucket(s3: SeaweedFS) -> Any:
    service = boto3.resource(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    return service.Bucket(s3.bucket)


@pytest.fixture(scope="module")
def source(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eleven seconds of audio in the result bucket."""
    path = tmp_path_factory.mktemp("source") / "source.wav"
    write_song(path, seed=12345, seconds=11)
    bucket.upload_file(str(path), "inputs/source.wav")
    return f"s3://{bucket.name}/inputs/source.wav"


def completed(events: list[JobEvent]) -> JobCompleted:
    event = events[-1]
    assert isinstance(event, JobCompleted), event
    return event


def unfinished(events: list[JobEvent]) -> Unfinished:
    event = events[-1]
    assert isinstance(event, TerminalEvent)
    assert isinstance(event.data, Unfinished), event
    return event.data


def download(bucket: Any, uri: str) -> bytes:
    body: bytes = bucket.Object(uri.removeprefix(f"s3://{bucket.name}/")).get()["Body"].read()
    return body


def seconds_of(body: bytes, path: Path) -> float:
    path.write_bytes(body)
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        assert (stream.rate, stream.channels) == (48_000, 2)
        return sum(frame.samples for frame in file.decode(stream)) / stream.rate


@pytest.mark.parametrize(
    ("task", "model", "audio_format"),
    [
        ("text2music", "acestep-v15-turbo", "mp3"),
        ("text2music", "acestep-v15-base", "opus"),
        ("cover", "acestep-v15-turbo", "flac"),
        ("cover-nofsq", "acestep-v15-turbo", "wav"),
        ("repaint", "acestep-v15-turbo", "wav"),
        ("extract", "acestep-v15-base", "ogg"),
        ("lego", "acestep-v15-base", "aac"),
        ("complete", "acestep-v15-base", "wav32"),
    ],
)
async def test_a_request_becomes_an_event_and_an_object_for_each_task_model_and_format(
    producer: Producer, bucket: Any, source: str, tmp_path: Path, task: str, model: str, audio_format: str
) -> None:
    audio = {} if task == "text2music" else {"src_audio_path": source, "repainting_end": 5}
    events = await producer.sing(
        task_type=task, model=model, audio_format=audio_format, audio_duration=10, inference_steps=4, **audio
    )
    data = completed(events).data
    assert isinstance(events[0], JobStarted)
    assert events[0].data.request == data.request
    assert (data.model.used, data.request.task_type) == (model, task)
    (song,) = data.audios
    assert max(peaks := base64.b64decode(song.peaks or "")) > 0
    assert len(peaks) == MAX_PEAKS
    body = download(bucket, song.uri)
    assert (hashlib.sha256(body).hexdigest(), len(body)) == (song.sha256, song.bytes)
    expected = 10 if task == "text2music" else 11
    assert song.duration_s == pytest.approx(expected, abs=0.1)
    assert seconds_of(body, tmp_path / "song") == pytest.approx(expected, abs=0.2)
    manifest = download(bucket, song.uri.rsplit("/", 1)[0] + "/manifest.json")
    assert type(data).model_validate_json(manifest) == data


async def test_the_codes_of_source_audio_are_in_the_event_without_a_song(producer: Producer, source: str) -> None:
    data = completed(await producer.sing(extract_codes_only=True, src_audio_path=source)).data
    assert (data.audios, data.lm) == ((), None)
    (codes,) = data.audio_codes
    assert len(codes) == 5 * 11


async def test_a_song_is_made_longer_by_its_id_from_its_own_latents_and_has_a_family(
    producer: Producer, bucket: Any, worker_environment: dict[str, str]
) -> None:
    """As an MP3, whose encoder pads the ends."""
    first, longer = f"first-{uuid.uuid4().hex}", f"longer-{uuid.uuid4().hex}"
    made = completed(await producer.sing(task_id=first, audio_duration=10, inference_steps=2)).data
    files = made.audios[0].files
    assert files is not None
    assert files.latents is not None
    assert len(download(bucket, files.latents.uri)) == files.latents.bytes > 250 * 4 * 2
    data = completed(await producer.sing(task_id=longer, source_task_id=first, extend_right_s=5)).data
    assert data.audios[0].duration_s == pytest.approx(15, abs=0.05)
    assert [(parent.task_id, parent.index, parent.field) for parent in data.parents] == [(first, 0, "extend_right_s")]
    assert {edit.field for edit in data.edits} >= {"model", "task_type", "repainting_start", "repainting_end"}
    assert data.warnings == ()
    refused = unfinished(await producer.sing(source_task_id="nobody-s", task_type="cover"))
    assert refused.error.code == "input_unreadable"
    found = await asyncio.to_thread(run_command, "lineage", first, "--json", variables=worker_environment)
    assert (found.returncode, "error" in found.stderr) == (0, False)
    assert [each["task_id"] for each in json.loads(found.stdout)["tasks"]] == [first, longer]
    found = await asyncio.to_thread(run_command, "lineage", longer, variables=worker_environment)
    above, below = found.stdout.replace("\xa0", " ").splitlines()
    assert above.startswith(f"{first}  text2music, 1 song  jazz")
    assert below.startswith(f"└── {longer} ◀  extend_right_s of song 0, 1 song  jazz")
    found = await asyncio.to_thread(run_command, "lineage", "nobody-s", variables=worker_environment)
    said = "error: nobody-s: the storage has no completed task of this id\n"
    assert (found.returncode, found.stderr.endswith(said)) == (1, True)


async def test_the_same_seed_gives_the_same_song_and_another_one_another(producer: Producer, bucket: Any) -> None:
    fields = {"audio_duration": 10, "audio_format": "wav", "inference_steps": 2}
    uris = [completed(await producer.sing(seed=seed, **fields)).data.audios[0].uri for seed in (7, 7, 8)]
    # The tag at the end of a file names its task.
    first, again, other = (download(bucket, uri).rpartition(b"id3 ")[0] for uri in uris)
    assert len(first) > 10 * 48_000 * 4
    assert first[8:] == again[8:] != other[8:]


async def test_lyrics_with_times_are_in_the_event_and_beside_the_song(producer: Producer, bucket: Any) -> None:
    asked = {"lyrics": "[Verse]\nla la\nshine on me", "timestamps": "true", "batch_size": 1, "loudness_lufs": -30}
    data = completed(await producer.sing(audio_duration=10, inference_steps=2, **asked)).data

    (song,) = data.audios
    assert [line.text for line in song.lyrics] == ["[Verse]", "la la", "shine on me"]
    assert song.lyric_score is not None
    assert song.loudness is not None
    assert song.loudness.lufs == pytest.approx(-30, abs=0.01)
    assert song.files is not None
    assert data.warnings == ()
    for file, beginning in ((song.files.lrc, b"[00:00.00][Verse]\n"), (song.files.vtt, b"WEBVTT\n\n")):
        assert file is not None
        body = download(bucket, file.uri)
        assert body.startswith(beginning)
        assert (hashlib.sha256(body).hexdigest(), len(body)) == (file.sha256, file.bytes)
    tags: Any = mutagen.File(io.BytesIO(download(bucket, song.uri))).tags
    assert tags["TXXX:TASK_ID"].text == [data.task_id]
    assert [text for text, _ in tags.getall("SYLT")[0].text] == ["[Verse]", "la la", "shine on me"]


async def test_progress_rises_and_the_terminal_event_is_the_last(producer: Producer) -> None:
    events = await producer.sing(audio_duration=30, inference_steps=20)
    fractions = [event.data.progress for event in events if event.type == "acestep.job.progress.v1"]
    assert fractions
    assert fractions == sorted(set(fractions))
    assert [event.terminal for event in events].count(True) == 1


async def test_values_over_the_tiers_limit_are_clamped_and_reported(producer: Producer) -> None:
    data = completed(await producer.sing(audio_duration=2, batch_size=5, bpm=20, inference_steps=1)).data
    changes = {change.field: (change.requested, change.applied) for change in data.policy.adjustments}
    assert changes == {"batch_size": (5, 1)}
    assert data.request.bpm == 20
    assert data.policy.tier == "tier1"
    assert [song.duration_s for song in data.audios] == [2]


async def test_candidates_are_scored_and_their_scores_are_in_event_and_manifest(
    producer: Producer, bucket: Any
) -> None:
    event = completed(
        await producer.sing(audio_duration=2, candidates=3, keep=2, seed=7, inference_steps=1, audio_format="flac")
    )
    data = event.data
    changes = {change.field: (change.requested, change.applied) for change in data.policy.adjustments}
    assert changes == {"candidates": (3, 1), "keep": (2, 1)}
    (candidate,) = data.candidates
    assert (candidate.seed, candidate.kept, candidate.index, data.score_table) == (7, True, 0, "acestep-consumer-1")
    assert candidate.score == BUILT_IN.score(candidate.measures)
    assert set(candidate.measures) == KNOWN - {"lyrics"}
    (song,) = data.audios
    assert song.uri.endswith("/0.flac")
    manifest = json.loads(download(bucket, song.uri.rsplit("/", 1)[0] + "/manifest.json"))
    assert manifest["candidates"] == [candidate.model_dump()]


async def test_a_redelivery_costs_no_render_and_repeats_the_event(producer: Producer, bucket: Any) -> None:
    fields = {"task_id": uuid.uuid4().hex, "audio_duration": 10, "inference_steps": 1}
    first = completed(await producer.sing(**fields))
    song = bucket.Object(first.data.audios[0].uri.removeprefix(f"s3://{bucket.name}/"))
    written = song.last_modified
    again = await producer.sing(**fields)
    assert [event.to_json() for event in again] == [first.to_json()], "no start, no progress: nothing was rendered"
    song.reload()
    assert song.last_modified == written


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b'{"prompt": ', "malformed_body", "JSON"),
        (b'"a text"', "malformed_body", "object"),
        (b'{"prompt": "x", "task_type": "dance"}', "invalid_request", "task_type"),
        (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', "message_too_large", "1,048,576"),
        (b'{"task_type": "repaint"}', "invalid_request", "src_audio_path"),
        (b'{"audio_duration": 900, "on_limit": "reject"}', "limit_exceeded", "180"),
    ],
)
async def test_bad_input_is_rejected_by_name_and_kept_byte_for_byte(
    producer: Producer, body: bytes, code: str, says: str
) -> None:
    task_id = uuid.uuid4().hex
    data = unfinished(await producer.send(task_id, body))
    assert (data.status, data.error.code) == ("rejected", code)
    assert says in data.error.message
    kept = await producer.dead_letter(task_id)
    assert kept.body == body
    assert kept.headers["x-acestep-code"] == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"thinking": True}, "lm_unavailable"),
        ({"model": "acestep-v15-sft", "on_model_unavailable": "fail"}, "model_unavailable"),
        ({"task_type": "cover", "src_audio_path": "s3://acestep-other/x.wav"}, "input_not_allowed"),
        ({"task_type": "cover", "src_audio_path": "https://example.org/x.wav"}, "input_not_allowed"),
    ],
)
async def test_what_this_worker_cannot_do_ends_with_a_reason(
    producer: Producer, fields: dict[str, object], code: str
) -> None:
    assert unfinished(await producer.sing(**fields)).error.code == code


async def test_an_input_that_is_no_audio_or_not_there_fails_its_job_alone(producer: Producer, bucket: Any) -> None:
    bucket.put_object(Key="inputs/text.wav", Body=b"this is no audio")
    for key in ("inputs/text.wav", "inputs/none.wav"):
        data = unfinished(await producer.sing(task_type="cover", src_audio_path=f"s3://{bucket.name}/{key}"))
        assert (data.status, data.error.code) == ("failed", "input_unreadable")
    completed(await producer.sing(audio_duration=10, inference_steps=1))


async def test_a_model_that_is_not_loaded_falls_back_and_says_so(producer: Producer) -> None:
    data = completed(await producer.sing(model="acestep-v15-xl-turbo", audio_duration=10, inference_steps=1)).data
    assert (data.model.requested, data.model.used) == ("acestep-v15-xl-turbo", "acestep-v15-turbo")
    assert data.model.fallback


async def test_jobs_in_flight_get_their_own_answers(producer: Producer) -> None:
    jobs = [producer.sing(audio_duration=10, inference_steps=1, seed=seed) for seed in range(4)]
    seeds = [completed(events).data.audios[0].seed for events in await asyncio.gather(*jobs)]
    assert seeds == [0, 1, 2, 3]


async def test_a_renderer_that_is_killed_costs_no_job(producer: Producer, worker: WorkerProcess) -> None:
    (renderer,) = worker.children()
    job = asyncio.create_task(producer.sing(audio_duration=60, inference_steps=30))
    async with asyncio.timeout(WITHIN_S), producer.client.subscribe("job.progress.*") as events:
        await anext(aiter(events))
    os.kill(renderer, signal.SIGKILL)
    completed(await job)
    assert worker.children() != [renderer]
    status, body = worker.get("/readyz")
    assert (status, set(body["checks"].values())) == (200, {True})


async def test_no_work_file_is_left_behind(producer: Producer, worker: WorkerProcess) -> None:
    completed(await producer.sing(audio_duration=10, inference_steps=1))
    (scratch,) = worker.log.parent.glob("acestep-*")
    assert [left.name for left in scratch.iterdir()] == [OWNER]
