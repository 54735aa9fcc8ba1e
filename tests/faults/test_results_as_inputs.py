# SPDX-License-Identifier: Apache-2.0
"""A request names another job's song as its source. The operator decides whether it may: ``ACESTEP_INPUT_RESULTS``."""

from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.config.settings import InputSettings, StorageSettings
from acestep_consumer.domain.errors import InputNotAllowed
from acestep_consumer.domain.objects import ObjectAddress, ObjectContent
from acestep_consumer.inputs.fetch import AllowedInputs
from tests.support.fake_store import FakeObjects
from tests.support.jobs import make_job

BUCKET, PREFIX = "acestep", "studio/jobs"
SONG, UPLOAD = f"s3://{BUCKET}/{PREFIX}/order-1/0.wav", f"s3://{BUCKET}/uploads/voice.wav"
REST_UPLOAD = f"s3://{BUCKET}/{PREFIX}/uploads/order-1/src_audio_path.wav"


async def fetched(folder: Path, uri: str, field: str = "src_audio_path", **settings: Any) -> bytes:
    """What a worker with these settings of ``InputSettings`` reads."""
    objects = FakeObjects()
    for address in (SONG, UPLOAD, REST_UPLOAD):
        await objects.put(ObjectAddress.of(address), ObjectContent.of(b"sound", "audio/wav"))
    storage = StorageSettings(bucket=BUCKET, prefix=PREFIX)
    async with AllowedInputs(objects, storage, InputSettings.model_validate(settings)) as inputs:
        sources = await inputs.fetch(make_job(task_type="cover", **{field: uri}), folder)
    path = sources.source if field == "src_audio_path" else sources.reference
    assert path is not None
    return path.read_bytes()


@pytest.mark.parametrize("uri", [SONG, UPLOAD])
async def test_by_default_every_object_of_the_result_bucket_may_be_a_source(tmp_path: Path, uri: str) -> None:
    assert await fetched(tmp_path, uri) == b"sound"
    assert await fetched(tmp_path, uri, results="all") == b"sound"


@pytest.mark.parametrize("field", ["src_audio_path", "reference_audio_path"])
@pytest.mark.parametrize("buckets", ["", BUCKET])
@pytest.mark.parametrize(
    "uri",
    [
        SONG,
        f"s3://{BUCKET}//{PREFIX}/order-1/0.wav",
        f"s3://{BUCKET}/studio//jobs/order-1/0.wav",
        f"s3://{BUCKET}/{PREFIX}/order-1/manifest.json",
    ],
)
async def test_with_none_a_song_of_another_job_is_refused_in_every_spelling(
    tmp_path: Path, uri: str, buckets: str, field: str
) -> None:
    with pytest.raises(InputNotAllowed, match=f"^{field} = .*: results are no inputs.*ACESTEP_INPUT_RESULTS=none"):
        await fetched(tmp_path, uri, field, results="none", buckets=buckets)


async def test_with_none_other_objects_of_that_bucket_need_a_word_of_the_operator(tmp_path: Path) -> None:
    with pytest.raises(InputNotAllowed, match=f"the bucket '{BUCKET}' is not in ACESTEP_INPUT_BUCKETS"):
        await fetched(tmp_path, UPLOAD, results="none")
    assert await fetched(tmp_path, UPLOAD, results="none", buckets=BUCKET) == b"sound"


async def test_with_none_an_upload_over_the_rest_api_is_a_source_and_nothing_else_beside_it_is(tmp_path: Path) -> None:
    assert await fetched(tmp_path, REST_UPLOAD, results="none") == b"sound"
    for uri in (
        f"s3://{BUCKET}/{PREFIX}/uploads/0.wav",  # the song of a task that is called "uploads"
        f"s3://{BUCKET}/{PREFIX}/uploads/order-1/../../order-1/0.wav",
        f"s3://{BUCKET}/{PREFIX}/uploads/order-1/0.wav",
        f"s3://{BUCKET}/{PREFIX}//uploads/order-1/src_audio_path.wav",
        f"s3://{BUCKET}/{PREFIX}/order-1/src_audio_path.wav",
    ):
        with pytest.raises(InputNotAllowed, match="ACESTEP_INPUT_RESULTS=none"):
            await fetched(tmp_path, uri, results="none")
    with pytest.raises(InputNotAllowed, match="ACESTEP_INPUT_BUCKETS"):
        await fetched(tmp_path, REST_UPLOAD.replace(BUCKET, "other"), results="none")


async def test_a_name_that_only_begins_like_the_prefix_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(InputNotAllowed, match="ACESTEP_INPUT_BUCKETS"):
        await fetched(tmp_path, f"s3://{BUCKET}/studio/jobs-2/a.wav", results="none")


async def test_a_lora_among_the_results_is_refused_too(tmp_path: Path) -> None:
    storage = StorageSettings(bucket=BUCKET, prefix=PREFIX)
    async with AllowedInputs(FakeObjects(), storage, InputSettings(results="none")) as inputs:
        job = make_job(lora={"path": f"s3://{BUCKET}/{PREFIX}/order-1/lora.safetensors"})
        with pytest.raises(InputNotAllowed, match=r"^lora\.path = .*ACESTEP_INPUT_RESULTS=none"):
            await inputs.fetch(job, tmp_path)


async def test_a_reload_changes_it(tmp_path: Path) -> None:
    storage = StorageSettings(bucket=BUCKET, prefix=PREFIX)
    objects = FakeObjects()
    await objects.put(ObjectAddress.of(SONG), ObjectContent.of(b"sound", "audio/wav"))
    job = make_job(task_type="cover", src_audio_path=SONG)
    async with AllowedInputs(objects, storage, InputSettings()) as inputs:
        await inputs.fetch(job, tmp_path)
        inputs.apply(InputSettings(results="none"))
        with pytest.raises(InputNotAllowed):
            await inputs.fetch(job, tmp_path)
