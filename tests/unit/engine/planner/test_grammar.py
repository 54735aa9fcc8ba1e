# SPDX-License-Identifier: Apache-2.0
"""The grammars, run by the library that runs them in the planner: what fits, what does not, and where they lead."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import xgrammar
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from acestep_consumer.engine.planner.grammar import MAX_CAPTION_LINES, metadata_grammar, song_grammar
from acestep_consumer.engine.planner.metadata import (
    FIELDS,
    Metadata,
    TempoAsGiven,
    as_given,
    parse,
    think_block,
    to_yaml,
)
from acestep_consumer.engine.planner.tokens import LmTokens
from tests.unit.engine.planner import songs

Matcher = Callable[[str], xgrammar.GrammarMatcher]
Fits = Callable[[str, str], bool]

SONG = Metadata(bpm=96, caption="A quiet song.", duration=185, keyscale="Bb major", language="en", timesignature="3")
LINES = to_yaml(SONG).split("\n")
# The first example compiles the rules that all grammars have in common, which takes longer than the others.
property_based = settings(deadline=None, max_examples=50)


@pytest.fixture(scope="session")
def matcher(tokens: LmTokens) -> Matcher:
    """A matcher at the beginning of a grammar; what is compiled is kept."""
    known_fields = xgrammar.TokenizerInfo.from_huggingface(tokens.tokenizer, vocab_size=len(tokens.tokenizer))
    compiler = xgrammar.GrammarCompiler(known_fields, max_threads=1)
    return lambda grammar: xgrammar.GrammarMatcher(compiler.compile_grammar(grammar))


@pytest.fixture(scope="session")
def fits(matcher: Matcher) -> Fits:
    """Whether a text is a whole answer."""

    def check(grammar: str, text: str) -> bool:
        at = matcher(grammar)
        return at.accept_string(text) and at.is_completed()

    return check


def think(*lines: str) -> str:
    return "\n".join(["<think>", *lines, "</think>"])


@pytest.mark.parametrize("grammar", [metadata_grammar(), song_grammar()], ids=["metadata", "song"])
def test_no_class_of_characters_is_negated(grammar: str) -> None:
    """The xgrammar that can be installed beside vLLM 0.24 cannot compile one with characters beyond ASCII."""
    assert "[^" not in grammar


@property_based
@given(song=songs.WHOLE)
def test_every_song_fits(fits: Fits, song: Metadata) -> None:
    assert fits(metadata_grammar(), think_block(song))


@property_based
@given(song=songs.WHOLE, fixed=songs.PARTS)
def test_given_fields_are_written_as_they_stand_and_as_nothing_else(
    fits: Fits, song: Metadata, fixed: Metadata
) -> None:
    given_fields = {field: getattr(fixed, field) for field in fixed.known_fields}
    grammar = metadata_grammar(fixed)
    assert fits(grammar, think_block(replace(song, **given_fields)))
    assert fits(grammar, think_block(song)) == all(
        getattr(song, field) == value for field, value in given_fields.items()
    )


def test_a_value_that_the_model_does_not_know_is_written_only_where_it_is_given(fits: Fits) -> None:
    key, signature = as_given("keyscale", "D dorian"), as_given("timesignature", "5/4")
    language, tempo = as_given("language", "Old Norse: verse"), TempoAsGiven(20)
    given = Metadata(keyscale=key, timesignature=signature, language=language, bpm=tempo)
    song = replace(SONG, keyscale=key, timesignature=signature, language=language, bpm=tempo)
    assert fits(metadata_grammar(given), think_block(song))
    found = parse(think_block(song), given)
    assert (found.bpm, found.language) == (20, "Old Norse: verse")
    assert not fits(metadata_grammar(), think_block(song))


@property_based
@given(song=songs.WHOLE, fields=st.sets(st.sampled_from(FIELDS)))
def test_only_the_wanted_fields_are_written(fits: Fits, song: Metadata, fields: set[str]) -> None:
    grammar = metadata_grammar(fields=fields)
    wanted = Metadata(**{field: getattr(song, field) for field in fields})
    assert fits(grammar, think_block(wanted))
    assert fits(grammar, think_block(song)) == (wanted == song)


@property_based
@given(song=songs.WHOLE, lyrics=songs.CAPTIONS)
def test_a_song_with_lyrics_fits_and_is_read_back(fits: Fits, song: Metadata, lyrics: str) -> None:
    with_lyrics = replace(song, lyrics=f"[Verse]\n{lyrics}\n\n[Chorus]\nla")
    text = f"{think_block(song)}\n\n# Lyric\n{with_lyrics.lyrics}"
    assert fits(song_grammar(), text)
    assert parse(text) == with_lyrics
    assert not fits(metadata_grammar(), text)
    assert not fits(song_grammar(), think_block(song))


def test_given_lyrics_are_written_as_they_stand(fits: Fits) -> None:
    grammar = song_grammar(Metadata(lyrics="[Instrumental]"))
    assert fits(grammar, f"{think_block(SONG)}\n\n# Lyric\n[Instrumental]")
    assert not fits(grammar, f"{think_block(SONG)}\n\n# Lyric\n[Verse]")


@pytest.mark.parametrize("max_duration_s", [10, 11, 59, 60, 99, 100, 180, 240, 299, 360, 480, 600])
def test_a_duration_is_at_least_ten_seconds_and_at_most_what_the_tier_allows(fits: Fits, max_duration_s: int) -> None:
    grammar = metadata_grammar(fields=["duration"], max_duration_s=max_duration_s)
    fitting = [seconds for seconds in range(1_111) if fits(grammar, think(f"duration: {seconds}"))]
    assert fitting == list(range(10, max_duration_s + 1))


def test_a_tempo_is_30_to_300(fits: Fits) -> None:
    grammar = metadata_grammar(fields=["bpm"])
    assert [bpm for bpm in range(1_111) if fits(grammar, think(f"bpm: {bpm}"))] == list(range(30, 301))


def test_the_limit_of_a_tier_does_not_touch_a_given_duration(fits: Fits) -> None:
    assert fits(metadata_grammar(SONG, max_duration_s=60), think_block(SONG))


@property_based
@given(order=st.permutations(LINES))
def test_fields_have_one_order(fits: Fits, order: list[str]) -> None:
    assert fits(metadata_grammar(), think(*order)) == (order == LINES)


@pytest.mark.parametrize("missing", LINES)
def test_no_field_may_be_missing(fits: Fits, missing: str) -> None:
    assert not fits(metadata_grammar(), think(*(line for line in LINES if line != missing)))


@pytest.mark.parametrize("extra", ["genres: folk", "bpm: 96", "", "# a comment"])
@pytest.mark.parametrize("place", range(len(LINES) + 1))
def test_nothing_may_stand_between_the_fields(fits: Fits, extra: str, place: int) -> None:
    assert not fits(metadata_grammar(), think(*LINES[:place], extra, *LINES[place:]))


@pytest.mark.parametrize(
    "wrong",
    [
        *("bpm: 096", "bpm: 96.0", "bpm: '96'", "bpm:96", "bpm: 96 ", "bpm: -96", "bpm: N/A", "Bpm: 96"),
        *("duration: 9", "duration: 0185", "duration: 601", "duration: 185s", "duration: "),
        *("keyscale: H major", "keyscale: B## major", "keyscale: Bm", "keyscale: b major", "keyscale: C"),
        *("language: xx", "language: EN", "language: english", "language: ''", "language: en, de"),
        *("timesignature: 5", "timesignature: 4/4", "timesignature: 44", "timesignature: '4'"),
        *("caption: ", "caption:  A", "caption: A\x07", "caption: A\tB", "caption: A\n  ", "caption: A\nB"),
        *("caption: A </think>", "caption: <|audio_code_7|>", "caption: ```", "caption: \u2003", "caption: A\u2028B"),
        "caption: " + "A" * 122,
        "caption: A" + "\n  A" * MAX_CAPTION_LINES,
    ],
)
def test_one_wrong_field_is_enough_to_be_refused(fits: Fits, wrong: str) -> None:
    field = wrong.partition(":")[0].lower()
    lines = [wrong if line.startswith(f"{field}:") else line for line in LINES]
    assert lines != LINES
    assert not fits(metadata_grammar(), think(*lines))


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}<|audio_code_7|>", "{}{}"])
def test_an_answer_ends_with_its_thoughts(fits: Fits, around: str) -> None:
    assert not fits(metadata_grammar(), around.replace("{}", think_block(SONG)))


@settings(property_based, max_examples=20)
@given(fixed=songs.PARTS, seed=st.integers(0, 2**32))
def test_any_walk_along_the_allowed_tokens_ends_in_valid_metadata(
    tokens: LmTokens, matcher: Matcher, fixed: Metadata, seed: int
) -> None:
    at = matcher(metadata_grammar(fixed, max_duration_s=240))
    text = tokens.decode(walk(tokens, at, random.Random(seed)))  # noqa: S311 - a test's walk
    song = parse(text)
    assert song.known_fields == FIELDS
    assert {field: getattr(song, field) for field in fixed.known_fields} == {
        f: getattr(fixed, f) for f in fixed.known_fields
    }
    assert fixed.duration or 10 <= (song.duration or 0) <= 240


@settings(property_based, max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_any_walk_through_a_song_ends_in_metadata_and_lyrics(tokens: LmTokens, matcher: Matcher, seed: int) -> None:
    text = tokens.decode(walk(tokens, matcher(song_grammar()), random.Random(seed)))  # noqa: S311 - a test's walk
    assume("\N{REPLACEMENT CHARACTER}" not in text)
    song = parse(text)
    assert song.known_fields == FIELDS
    assert song.lyrics


def walk(tokens: LmTokens, at: xgrammar.GrammarMatcher, chance: random.Random) -> list[int]:
    """Any allowed token after any other, up to the end of the turn, which must be the only way to end."""
    mask = xgrammar.allocate_token_bitmask(1, len(tokens.tokenizer))
    walked: list[int] = []
    while not at.is_terminated():
        at.fill_next_token_bitmask(mask)
        allowed = members(mask[0].tolist())
        assert max(allowed) < tokens.first_code
        walked.append(chance.choice(allowed))
        assert at.accept_token(walked[-1])
    assert walked[-1] == tokens.end_of_turn
    return walked


def members(words: list[int]) -> list[int]:
    """Numbers of the bits that are set, 32 to a word. The few words that have any are looked at."""
    return [32 * at + bit for at, word in enumerate(words) if word for bit in range(32) if word >> bit & 1]
