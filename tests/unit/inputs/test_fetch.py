# SPDX-License-Identifier: Apache-2.0
"""What S3 refuses: the input's fault, or that of the worker's own keys, which no job fails of."""

from typing import TYPE_CHECKING, cast

import pytest

from acestep_consumer.domain.errors import (
    InputUnreadable,
    StorageMisconfigured,
    StorageRefused,
    StorageUnavailable,
)
from acestep_consumer.inputs.fetch import _refused_input

if TYPE_CHECKING:
    from acestep_consumer.inputs.fetch import _Input

WANTED = cast("_Input", "src_audio_path = s3://b/k")


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
