# SPDX-License-Identifier: Apache-2.0
"""The error for a job without songs says how it ended, in its class, its code and its text."""

import pytest

from acestep_consumer.client import (
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobRejectedError,
    NoSongs,
)
from acestep_consumer.client.errors import no_songs
from acestep_schemas import examples
from acestep_schemas.events import ErrorCode

ID = examples.TASK_ID


@pytest.mark.parametrize(
    ("state", "error", "code", "text"),
    [
        ("failed", JobFailedError, ErrorCode.RESOURCE_EXHAUSTED, f"{ID} failed: resource_exhausted: the GPU has too"),
        ("rejected", JobRejectedError, ErrorCode.INVALID_REQUEST, f"{ID} was rejected: invalid_request: audio_format"),
        ("cancelled", JobCancelledError, ErrorCode.CANCELLED, f"{ID} was cancelled"),
        ("expired", JobExpiredError, ErrorCode.EXPIRED, f"{ID} expired: it waited longer than its deadline allows"),
    ],
)
def test_each_end_without_songs_has_an_error_of_its_own(
    state: str, error: type[NoSongs], code: ErrorCode, text: str
) -> None:
    event = examples.unfinished(state)
    found = no_songs(event)
    assert type(found) is error
    assert (found.code, found.event) == (code, event)
    assert str(found).startswith(text)


def test_a_job_that_completed_without_audio_has_no_code() -> None:
    event = examples.completed()
    request = event.data.request.model_copy(update={"analysis_only": True})
    found = no_songs(event.model_copy(update={"data": event.data.model_copy(update={"request": request})}))
    assert type(found) is NoSongs
    assert found.code is None
    assert str(found) == f"{ID} completed without songs: the request asked for metadata alone"
