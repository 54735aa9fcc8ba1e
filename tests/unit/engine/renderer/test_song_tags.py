# SPDX-License-Identifier: Apache-2.0
"""Titles of songs, and what else their files say."""

import pytest

from acestep_consumer.engine.renderer.song_tags import GENERATED, song_tags, title
from acestep_schemas.events import LyricLine
from tests.unit.engine.renderer.test_pipeline_arguments import job


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("slow jazz, brushed drums", "slow jazz, brushed drums"),
        ("  slow\n\tjazz,  ", "slow jazz"),
        (
            "upbeat electronic dance music with heavy bass, bright synths and a catchy vocal",
            "upbeat electronic dance music with heavy bass, bright synths",
        ),
        ("word " * 40, "word word word word word word word word word word word word"),
        ("夜" * 80, "夜" * 60),
        ("", ""),
    ],
)
def test_a_title_is_the_first_words_of_the_prompt(prompt: str, expected: str) -> None:
    assert title(prompt) == expected


def test_a_file_says_what_made_it() -> None:
    lines = (LyricLine(text="la la", start_s=1.6, end_s=2.0),)

    assert dict(song_tags(job(), "jazz", "la la\n", 7, lines)) == {
        "title": "jazz",
        "comment": GENERATED,
        "lyrics": "la la",
        "syncedlyrics": "[00:01.60]la la",
        "model": "acestep-v15-turbo",
        "seed": "7",
        "task_id": "job",
    }


def test_a_song_without_prompt_and_lyrics_has_no_such_tags() -> None:
    assert {"title", "lyrics", "syncedlyrics"}.isdisjoint(dict(song_tags(job(), "", " ", 7, ())))
