# SPDX-License-Identifier: Apache-2.0
"""LRC and WebVTT, and the lines and pieces that they are made from."""

from pathlib import Path

from acestep_consumer.engine.renderer.lyrics.lyric_alignment import LyricTokens, Piece, lines_of, pieces_of
from acestep_consumer.engine.renderer.lyrics.lyric_files import lrc, vtt, write_lyrics
from acestep_schemas.events import LyricLine, LyricToken

LINES = (
    LyricLine(text="[Chorus]", start_s=0.0, end_s=1.2),
    LyricLine(
        text="Rock <& roll>",
        start_s=59.996,
        end_s=62.4,
        tokens=(
            LyricToken(text="Rock", start_s=59.996, end_s=60.5),
            LyricToken(text=" <&", start_s=60.5, end_s=60.5),
            LyricToken(text=" roll>", start_s=60.5, end_s=62.4),
        ),
    ),
    LyricLine(
        text="again", start_s=3_661.0, end_s=3_661.0, tokens=(LyricToken(text="again", start_s=3_661, end_s=3_661),)
    ),
)


def test_lrc_has_minutes_seconds_and_hundredths() -> None:
    assert lrc(LINES) == "[00:00.00][Chorus]\n[01:00.00]Rock <& roll>\n[61:01.00]again"


def test_vtt_has_a_cue_for_each_sung_line_with_the_times_of_its_tokens() -> None:
    assert vtt(LINES) == (
        "WEBVTT\n\n"
        "00:00:59.996 --> 00:01:02.400\nRock<00:01:00.500> &lt;&amp; roll&gt;\n\n"
        "01:01:01.000 --> 01:01:01.080\nagain"
    )


def test_both_files_lie_beside_the_song(tmp_path: Path) -> None:
    found = write_lyrics(LINES, tmp_path / "0")

    assert [(file.kind, file.path.name, file.content_type) for file in found] == [
        ("lrc", "0.lrc", "text/plain; charset=utf-8"),
        ("vtt", "0.vtt", "text/vtt; charset=utf-8"),
    ]
    assert found[0].path.read_text(encoding="utf-8").splitlines()[1] == "[01:00.00]Rock <& roll>"


def test_tokens_that_are_parts_of_a_character_are_one_piece() -> None:
    data = "a夜b".encode()
    texts = [data[at : at + 1].decode(errors="replace") for at in range(len(data))]

    found = list(pieces_of(texts, lambda first, end: data[first:end].decode(errors="replace")))

    assert found == [Piece("a", 0, 0), Piece("夜", 1, 3), Piece("b", 4, 4)]


def lyric_tokens(*texts: str) -> LyricTokens:
    return LyricTokens(5, len(texts), tuple(Piece(text, index, index) for index, text in enumerate(texts)))


def test_a_line_ends_with_its_break_and_empty_lines_are_left_out() -> None:
    tokens = lyric_tokens("la", " la\n", "\n", "oh")
    found = list(lines_of(tokens, [(0.0, 0.4), (0.48, 1.2), (1.28, 1.6), (1.68, 2.0)]))

    assert found == [
        LyricLine(
            text="la la",
            start_s=0.0,
            end_s=1.2,
            tokens=(LyricToken(text="la", start_s=0.0, end_s=0.4), LyricToken(text=" la", start_s=0.48, end_s=1.2)),
        ),
        LyricLine(text="oh", start_s=1.68, end_s=2.0, tokens=(LyricToken(text="oh", start_s=1.68, end_s=2.0),)),
    ]


def test_tokens_of_section_tags_are_not_sung() -> None:
    assert lyric_tokens("[Verse", " 1", "]\n", "la", " (oh)", "[x]", "la").sung().tolist() == [
        *(False, False, False),
        *(True, True, False, True),
    ]
