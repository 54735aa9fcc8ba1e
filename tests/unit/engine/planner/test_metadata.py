# SPDX-License-Identifier: Apache-2.0
"""Metadata and its YAML, there and back."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.engine.planner.metadata import (
    AsGiven,
    Metadata,
    MetadataError,
    as_given,
    parse,
    think_block,
    to_yaml,
)
from tests.unit.engine.planner.songs import PARTS, WHOLE

LONG = "A soaring synthwave anthem with gated drums, wide analogue pads and a lead that never quite comes to rest"


def test_yaml_is_sorted_bare_and_wrapped_with_an_indent() -> None:
    song = Metadata(timesignature="6", language="en", keyscale="Bb major", duration=185, caption=LONG, bpm=96)
    assert to_yaml(song) == (
        "bpm: 96\n"
        "caption: A soaring synthwave anthem with gated drums, wide analogue pads and a lead\n"
        "  that never quite comes to rest\n"
        "duration: 185\n"
        "keyscale: Bb major\n"
        "language: en\n"
        "timesignature: 6"
    )


@pytest.mark.parametrize(
    ("signature", "written"), [("5/4", "5"), ("12/8", "12"), ("4/4", "4"), ("free", "free"), ("7", "7")]
)
def test_a_time_signature_of_the_request_is_written_with_its_beats(signature: str, written: str) -> None:
    assert to_yaml(Metadata(timesignature=as_given("timesignature", signature))) == f"timesignature: {written}"


def test_a_key_that_the_model_does_not_know_is_taken_letter_for_letter() -> None:
    assert isinstance(as_given("keyscale", "Am"), AsGiven)
    assert not isinstance(as_given("keyscale", "A minor"), AsGiven)
    dorian = Metadata(keyscale=as_given("keyscale", "D dorian"))
    assert to_yaml(dorian) == "keyscale: D dorian"
    assert parse("keyscale: D dorian\nbpm: 96", dorian).keyscale == "D dorian"
    with pytest.raises(MetadataError, match="keyscale"):
        parse("keyscale: D dorian\nbpm: 96")


def test_a_given_key_cannot_end_the_thoughts() -> None:
    assert to_yaml(Metadata(keyscale=as_given("keyscale", "x\n</think><|im_end|>\ud800"))) == (
        "keyscale: x < /think>< |im_end|>�"
    )
    assert as_given("keyscale", " \n") is None


def test_only_what_is_known_is_written() -> None:
    assert to_yaml(Metadata(bpm=96, lyrics="la")) == "bpm: 96"
    assert to_yaml(Metadata()) == ""
    assert think_block(Metadata()) == "<think>\n</think>"


def test_norwegian_is_no_boolean() -> None:
    assert to_yaml(Metadata(language="no")) == "language: 'no'"
    assert parse("language: 'no'").language == parse("language: no").language == "no"


@given(PARTS)
def test_yaml_means_to_others_what_it_means_here(song: Metadata) -> None:
    read = yaml.safe_load(to_yaml(song)) or {}
    assert {field: str(value) for field, value in read.items()} == {f: str(getattr(song, f)) for f in song.known_fields}


@given(PARTS.filter(lambda song: bool(song.known_fields)))
def test_what_was_written_is_read_back(song: Metadata) -> None:
    assert parse(think_block(song)) == song


@given(WHOLE, st.data())
def test_a_caption_may_be_wrapped_anywhere(song: Metadata, data: st.DataObject) -> None:
    breaks = data.draw(st.lists(st.sampled_from([" ", "\n  ", "\n    ", "  "]), min_size=40, max_size=40))
    words = f"So: {song.caption}".split()
    wrapped = "".join(word + gap for word, gap in zip(words, [*breaks, ""], strict=False))
    assert parse(f"<think>\nbpm: 99\ncaption: {wrapped}\nduration: 60\n</think>").caption == " ".join(words)


def test_lyrics_follow_the_thoughts_under_a_heading() -> None:
    song = parse("<think>\nbpm: 96\n</think>\n\n# Lyric\n[Verse]\nRain: again\n\n[Chorus]\nStay\n")
    assert song == Metadata(bpm=96, lyrics="[Verse]\nRain: again\n\n[Chorus]\nStay")


@pytest.mark.parametrize("text", ["<think>\nbpm: 96\n</think>", "bpm: 96\n</think>", "bpm: 96", "BPM:  96 \n\nmood: ?"])
def test_tags_space_and_strange_fields_do_not_matter(text: str) -> None:
    assert parse(text) == Metadata(bpm=96)


def test_other_spellings_of_a_value_are_read() -> None:
    song = parse("timesignature: 4/4\nkeyscale: Am\nlanguage: en-US\nbpm: 120.0")
    assert song == Metadata(timesignature="4", keyscale="A minor", language="en", bpm=120)


def test_of_a_field_written_twice_the_first_counts() -> None:
    assert parse("bpm: 96\nbpm: 120\n  more").bpm == 96


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("'It''s late: go'", "It's late: go"),
        ('"a \\"b\\" \\u00e9"', 'a "b" é'),
        ("'Tis late", "'Tis late"),
        ("'a': b", "'a': b"),
        ("\"a\\qb'", "\"a\\qb'"),
    ],
)
def test_quotes_are_undone_where_they_are_yaml(raw: str, caption: str) -> None:
    assert parse(f"caption: {raw}").caption == caption


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no metadata in ''"),
        ("<think>\n</think>\nbpm: 96", "there is no metadata"),
        ("bpm: 29", "bpm = 29: must be 30 to 300"),
        ("bpm: fast", "bpm = fast: must be a number"),
        ("duration: 601", "duration = 601: must be 10 to 600"),
        ("duration: 30.5", "duration = 30.5: must be a whole number"),
        ("keyscale: H major", "keyscale = H major: must be a key"),
        ("timesignature: 5/4", "timesignature = 5/4: must be 2, 3, 4 or 6"),
    ],
)
def test_text_without_a_song_is_an_error_that_names_the_field(text: str, message: str) -> None:
    with pytest.raises(MetadataError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("field", "value"), [("bpm", 301), ("duration", 9), ("keyscale", "Am"), ("language", "xx"), ("timesignature", "5")]
)
def test_metadata_that_no_song_has_cannot_be_made(field: str, value: object) -> None:
    with pytest.raises(MetadataError, match=field):
        Metadata(**{field: value})  # type: ignore[arg-type]  # the wrong value is the point


def test_a_caption_is_one_line_that_ends_no_thought() -> None:
    assert Metadata(caption=" a\n\n b\x00\tc </think> \ud800").caption == "a b c < /think> \N{REPLACEMENT CHARACTER}"
    assert Metadata(caption=" \n ").caption is None


def test_genres_are_read_and_are_in_no_prompt() -> None:
    song = parse("<think>\nbpm: 96\ngenres: 'folk, jazz'\n</think>\n\n# Lyric\nla")
    assert (song.genres, song.lyrics) == ("folk, jazz", "la")
    assert to_yaml(song) == "bpm: 96"
    assert parse("<think>\nbpm: 96\ngenres:\n</think>").genres is None
