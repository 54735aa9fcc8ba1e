# SPDX-License-Identifier: Apache-2.0
"""What ``submit`` says of a request's place and time."""

from typing import Any

import pytest

from acestep_consumer.client import Outlook
from acestep_consumer.commands.submit.run import in_words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "position 3 in the queue; songs in about 70 s (2 workers, 4 jobs in progress)"),
        (
            {"position": 0, "workers": 1, "in_hand": 1},
            "taken by a worker; songs in about 70 s (1 worker, 1 job in progress)",
        ),
        ({"expected_s": None, "note": "nobody answered"}, "position 3 in the queue; nobody answered"),
        ({"position": None, "expected_s": None, "note": "no broker"}, "no broker"),
        (
            {"note": "and more"},
            "position 3 in the queue; songs in about 70 s (2 workers, 4 jobs in progress); and more",
        ),
    ],
)
def test_it_is_a_line_of_what_is_known_and_why_the_rest_is_not(fields: dict[str, Any], words: str) -> None:
    known = {"position": 3, "in_hand": 4, "workers": 2, "expected_s": 70}
    assert in_words(Outlook(**{**known, **fields})) == words
