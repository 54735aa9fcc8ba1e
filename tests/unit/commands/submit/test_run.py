# SPDX-License-Identifier: Apache-2.0
"""What ``submit`` says of a request's place and time, and of its end."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from acestep_consumer.client import Outlook
from acestep_consumer.commands.submit.run import _print_result, in_words
from acestep_schemas import examples
from acestep_schemas.events import Candidate, JobCompleted


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


def test_candidates_are_listed_with_their_scores() -> None:
    made = (
        Candidate(seed=7, score=0.306, kept=False),
        Candidate(seed=8, score=0.651, kept=True, index=0),
        Candidate(seed=9, score=None, kept=False),
    )
    event = JobCompleted.of(examples.completed().data.model_copy(update={"candidates": made}))
    text = StringIO()
    _print_result(event, Console(file=text))
    assert text.getvalue().splitlines()[-4:-1] == [
        "candidate with seed 7: score 0.31, not kept",
        "candidate with seed 8: score 0.65, kept as 0",
        "candidate with seed 9: could not be decoded, not kept",
    ]
