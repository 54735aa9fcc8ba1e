# SPDX-License-Identifier: Apache-2.0
"""Inputs that are in the request itself; what S3 refuses: the input's fault, or that of the worker's own keys."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from acestep_consumer.config.settings import InputSettings, StorageSettings
from acestep_consumer.domain.errors import (
    InputUnreadable,
    StorageMisconfigured,
    StorageRefused,
    StorageUnavailable,
)
from acestep_consumer.domain.job import Sources
from acestep_consumer.inputs.fetch import AllowedInputs, _refused_input
from tests.support.admission import admitted_job
from tests.support.fake_store import FakeObjects

if TYPE_CHECKING:
    from acestep_consumer.inputs.fetch import _Input

AUDIO = base64.b64encode(b"RIFF sound").decode()
WANTED = cast("_Input", "src_audio_path = s3://b/k")


async def fetched(folder: Path, settings: InputSettings | None = None, **fields: Any) -> Sources:
    async with AllowedInputs(FakeObjects(), StorageSettings(), settings or InputSettings()) as inputs:
        return await inputs.fetch(admitted_job(**fields), folder)


@pytest.mark.parametrize("reason", ["NoSuchKey", "AccessDenied", "NoSuchBucket", "403"])
def test_what_a_request_names_and_cannot_be_had_is_its_own_fault(reason: str) -> None:
    error = _refused_input(WANTED, StorageRefused("s3://b/k", reason))
    assert type(error) is InputUnreadable
    assert str(error) == f"src_audio_path = s3://b/k: S3 returned {reason}"


@pytest.mark.parametrize(
    "error",
    [
        StorageMisconfigured("no keys for S3"),
        StorageRefused("s3://b/k", "ExpiredToken"),
        StorageRefused("s3://b/k", "RequestTimeTooSkewed"),
    ],
)
def test_keys_that_somebody_has_to_renew_are_an_outage(error: StorageRefused) -> None:
    assert type(_refused_input(WANTED, error)) is StorageUnavailable


async def test_audio_in_the_request_becomes_the_file_of_its_input(tmp_path: Path) -> None:
    sources = await fetched(tmp_path, task_type="cover", src_audio_base64=AUDIO, reference_audio_base64=AUDIO)
    assert sources == Sources(source=tmp_path / "source", reference=tmp_path / "reference")
    assert sources.source is not None
    assert sources.source.read_bytes() == b"RIFF sound"


async def test_a_flow_edit_has_its_source(tmp_path: Path) -> None:
    assert (await fetched(tmp_path, flow_edit_morph=True, src_audio_base64=AUDIO)).source == tmp_path / "source"
    assert (await fetched(tmp_path, src_audio_base64=AUDIO)).source is None


async def test_audio_in_the_request_has_the_limit_of_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable, match=r"^src_audio_base64: more than 4 bytes \(ACESTEP_INPUT_MAX_BYTES\)$"):
        await fetched(tmp_path, InputSettings(max_bytes=4), task_type="cover", src_audio_base64=AUDIO)
