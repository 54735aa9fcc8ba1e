# SPDX-License-Identifier: Apache-2.0
"""Thinking from end to end: a worker with the tiny language model, from the message to the song and its manifest."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from acestep_consumer.client import Client
from acestep_consumer.domain.audio_codes import format_codes
from acestep_schemas.events import Completed, JobCompleted, JobProgress, WorkerEvent
from infra.local.s3 import SeaweedFS
from tests.support.engine_double import write_song
from tests.support.worker import WorkerProcess

SHORT = {"use_cot_caption": False, "use_cot_language": False, "audio_duration": 10, "inference_steps": 2}


@pytest.fixture(scope="module")
def thinking_worker(
    own_worker_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerProcess, str]]:
    """A worker with the language model on transformers, on a queue of its own."""
    # Without tags, which name the task, equal songs are equal files.
    own = {"ACESTEP_INIT_LLM": "true", "ACESTEP_LM_BACKEND": "pt", "ACESTEP_TAGS": "false"}
    environment = own_worker_environment | own
    with WorkerProcess(tmp_path_factory.mktemp("thinking"), environment) as running:
        yield running, environment["ACESTEP_AMQP_URL"]


async def sing(url: str, **fields: object) -> tuple[Completed, list[JobProgress]]:
    """The completed event's data, and the progress on the way."""
    task_id = uuid.uuid4().hex
    progress: list[JobProgress] = []
    async with Client(url) as client, client.subscribe(f"job.*.{task_id}") as events:
        await client.submit({"prompt": "jazz", "task_id": task_id, **SHORT, **fields})
        async for event in events:
            assert not isinstance(event, WorkerEvent)
            if isinstance(event, JobProgress):
                progress.append(event)
            if event.terminal:
                assert isinstance(event, JobCompleted), event
                return event.data, progress
    raise AssertionError("the stream of events ended")


async def test_a_song_that_was_thought_of_can_be_made_again_without_the_language_model(
    thinking_worker: tuple[WorkerProcess, str],
) -> None:
    _, url = thinking_worker
    first, progress = await sing(url, thinking=True, audio_format="wav", seed=7)
    assert first.lm is not None
    assert (first.lm.model, first.lm.backend) == ("acestep-5Hz-lm-0.6B", "pt")
    assert [len(codes) for codes in first.audio_codes] == [50]
    assert first.timings.plan is not None
    assert progress[0].data.stage == "plan"
    metas = first.metas
    again, _ = await sing(
        url,
        audio_code_string=format_codes(first.audio_codes[0]),
        seed=7,
        audio_format="wav",
        caption=metas.caption,
        bpm=metas.bpm,
        keyscale=metas.keyscale,
        timesignature=metas.timesignature,
        language=metas.language,
    )
    assert again.lm is None
    assert again.audios[0].sha256 == first.audios[0].sha256


async def test_an_analysis_gives_metadata_and_no_audio(
    thinking_worker: tuple[WorkerProcess, str],
) -> None:
    _, url = thinking_worker
    data, _ = await sing(url, analysis_only=True, audio_duration=None)
    assert data.audios == ()
    assert data.metas.bpm is not None
    assert data.metas.duration is not None


async def test_a_full_analysis_describes_the_source_audio(
    thinking_worker: tuple[WorkerProcess, str], s3: SeaweedFS, tmp_path: Path
) -> None:
    _, url = thinking_worker
    song = tmp_path / "song.wav"
    write_song(song, seed=1, seconds=12)
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
    )
    client.upload_file(str(song), s3.bucket, "inputs/heard.wav")
    source = f"s3://{s3.bucket}/inputs/heard.wav"
    data, _ = await sing(url, full_analysis_only=True, src_audio_path=source, audio_duration=None)
    assert data.audios == ()
    # As in ACE-Step, the length too is the language model's own, and this one's weights are random.
    assert data.metas.duration is not None
    assert data.metas.bpm is not None
    assert data.metas.lyrics


async def test_the_tiers_limits_with_the_language_model_hold(thinking_worker: tuple[WorkerProcess, str]) -> None:
    worker, url = thinking_worker
    data, _ = await sing(url, thinking=True, batch_size=4)
    assert data.policy.lm_loaded
    assert data.policy.limits.max_batch_size == 1
    assert [change.field for change in data.policy.adjustments] == ["batch_size"]
    assert len(worker.children()) == 2
