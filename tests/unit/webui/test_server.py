# SPDX-License-Identifier: Apache-2.0
"""The requests that the page's form may send."""

import pytest

from acestep_consumer.webui.server import read_form
from acestep_schemas.request import RequestInvalid


def test_a_request_gets_an_id_and_empty_fields_are_left_out() -> None:
    body, request = read_form({"prompt": "jazz", "lyrics": "", "seed": None, "audio_duration": "90"})
    assert set(body) == {"prompt", "audio_duration", "task_id"}
    assert (request.prompt, request.audio_duration) == ("jazz", 90.0)
    assert len(str(body["task_id"])) == 36


def test_a_request_keeps_the_id_that_the_page_gave_it() -> None:
    assert read_form({"prompt": "jazz", "task_id": "mine"})[0]["task_id"] == "mine"


def test_every_field_that_is_wrong_is_named() -> None:
    with pytest.raises(RequestInvalid) as caught:
        read_form({"prompt": "jazz", "audio_format": "midi", "seed": "seven", "task_id": "../up"})
    assert {problem.field for problem in caught.value.problems} == {"audio_format", "seed", "task_id"}


@pytest.mark.parametrize("body", [[], "x", None, 7, {}, {"prompt": "  "}, {"lyrics": "la"}])
def test_a_request_without_words_is_refused(body: object) -> None:
    with pytest.raises(RequestInvalid):
        read_form(body)


def test_fields_that_the_form_has_not_are_refused() -> None:
    with pytest.raises(RequestInvalid, match=r"src_audio_path = …: is not a field of this form"):
        read_form({"prompt": "jazz", "src_audio_path": "s3://elsewhere/x"})
