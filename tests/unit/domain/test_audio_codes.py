# SPDX-License-Identifier: Apache-2.0
"""Audio codes as text: what is formatted is parsed again, and songs of one request have equally many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.domain.audio_codes import CODE_COUNT, format_code, format_codes, parse_codes, parse_songs

CODES = st.lists(st.integers(0, CODE_COUNT - 1))


@given(CODES)
def test_formatted_codes_are_parsed_into_the_same_numbers(numbers: list[int]) -> None:
    assert parse_codes(format_codes(numbers)) == tuple(numbers)


def test_a_code_is_spelled_as_in_the_language_models_vocabulary() -> None:
    assert format_code(12) == "<|audio_code_12|>"
    assert format_codes([12, 7]) == "<|audio_code_12|><|audio_code_7|>"


def test_text_between_codes_is_ignored() -> None:
    assert parse_codes(" <|audio_code_1|>, and\n<|audio_code_007|><|audio_code_|><|audio_code_-3|>") == (1, 7)
    assert parse_codes("") == ()


def test_one_text_is_used_for_all_songs() -> None:
    assert parse_songs([format_codes([1, 2])], 3) == ((1, 2),) * 3
    assert parse_songs([format_codes([1, 2]), format_codes([3, 4])], 2) == ((1, 2), (3, 4))


@pytest.mark.parametrize(
    ("texts", "songs", "message"),
    [
        (["<|audio_code_1|>", ""], 2, "equally many"),
        (["<|audio_code_1|>", "<|audio_code_2|>"], 3, "equally many"),
        (["no codes"], 1, r"holds no code; codes look like <\|audio_code_123\|>"),
    ],
)
def test_songs_without_codes_or_with_different_numbers_of_them_are_refused(
    texts: list[str], songs: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_songs(texts, songs)
