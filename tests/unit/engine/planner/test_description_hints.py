# SPDX-License-Identifier: Apache-2.0
"""Language and vocals that a description of a song names."""

import pytest

from acestep_consumer.engine.planner.description_hints import hints_in


@pytest.mark.parametrize(
    ("description", "language"),
    [
        ("a soft Bengali love song for a quiet evening", "bn"),
        ("Pop rock. ENGLISH", "en"),
        ("canción en español", "es"),
        ("安静的中文歌", "zh"),
        ("French lyrics, then German ones", "fr"),
        ("a song for a quiet evening", None),
        ("it is a hi-fi lullaby", None),
        ("polishing the silver", None),
        ("", None),
    ],
)
def test_a_language_is_found_by_its_name_and_never_by_its_code(description: str, language: str | None) -> None:
    assert hints_in(description).language == language


@pytest.mark.parametrize(
    ("description", "instrumental"),
    [
        ("an Instrumental for the morning", True),
        ("pure music, two cellos", True),
        ("a long piano solo", True),
        ("solo singer at a fire", False),
        ("a soloist's song", False),
        ("", False),
    ],
)
def test_a_song_without_vocals_is_recognised(description: str, *, instrumental: bool) -> None:
    assert hints_in(description).instrumental is instrumental
