# SPDX-License-Identifier: Apache-2.0
import asyncio
import io
import time

import pytest
from rich.console import Console

from acestep_consumer.commands.terminal import (
    UNKNOWN,
    about,
    live_display,
    number,
    plural,
    seconds,
    share,
    size,
    two_digits,
    waiting_for,
)
from tests.support.waiting import eventually


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, UNKNOWN), (0, "0 s"), (1.25, "1.2 s"), (42.4, "42 s"), (250, "4 min 10 s"), (7_500, "2 h 05 min")],
)
def test_seconds_are_written_as_people_say_them(value: float | None, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, UNKNOWN), (512, "512 B"), (1_500_000, "1.5 MB"), (2e9, "2.0 GB"), (3e15, "3000.0 TB")],
)
def test_sizes_have_units(value: float | None, text: str) -> None:
    assert size(value) == text


def test_shares_are_percentages() -> None:
    assert (share(0.5), share(None)) == ("50%", UNKNOWN)


@pytest.mark.parametrize(
    ("value", "text"), [(None, UNKNOWN), (3, "3"), (2.345, "2.35"), (9_999, "9,999"), (1_234_567.8, "1,234,568")]
)
def test_numbers_never_have_exponents(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123, "0.12"), (3.46, "3.5"), (21.4, "21"), (154, "150"), (1_165, "1,200"), (12_345, "12,000")],
)
def test_estimates_have_two_digits(value: float, text: str) -> None:
    assert two_digits(value) == text


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (None, None, "unknown"),
        (1, None, "a few seconds"),
        (43, None, "about 45 s"),
        (117, None, "about 120 s"),
        (228, None, "about 4 min"),
        (3_006, None, "about 50 min"),
        (9_000, None, "about 3 h"),
        (235, 400, "about 4 to 7 min"),
        (100, 400, "about 100 s to 7 min"),
        (4, 40, "up to 40 s"),
        (61, 63, "about 60 s"),
    ],
)
def test_an_estimate_has_no_more_digits_than_it_is_worth(least: float | None, most: float | None, text: str) -> None:
    assert about(least, most) == text


def test_nouns_agree_with_their_numbers() -> None:
    assert [plural(count, "job") for count in (0, 1, 2, 1_000)] == ["0 jobs", "1 job", "2 jobs", "1,000 jobs"]


def test_each_frame_on_a_terminal_ends_with_an_empty_line() -> None:
    """At the end of a full line the echo of Ctrl-C would wrap, and the first line of the last frame stay on screen."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=10, color_system=None)
    with live_display(console) as draw:
        draw("0123456789")
        assert text.getvalue().endswith("0123456789\n")
        draw("abcdefghij")
        assert text.getvalue().endswith("abcdefghij\n")


def test_elsewhere_frames_are_lines_one_below_the_other_however_narrow() -> None:
    text = io.StringIO()
    with live_display(Console(file=text, width=5)) as draw:
        draw("a long line")
        draw("another one")
    assert text.getvalue() == "a long line\nanother one\n"


async def test_what_a_command_waits_for_is_said_once_and_not_because_the_command_itself_was_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("acestep_consumer.commands.terminal._SAID_AFTER_S", 0.2)
    said = io.StringIO()
    note = Console(file=said)
    with waiting_for("a server", note):
        time.sleep(0.5)  # noqa: ASYNC251 - as an import does it
        await asyncio.sleep(0)
    assert said.getvalue() == ""
    with waiting_for("a server", note) as answered:
        answered()
        await asyncio.sleep(0.4)
    assert said.getvalue() == ""
    with waiting_for("a server", note):
        await eventually(said.getvalue)
        await asyncio.sleep(0.4)
    assert said.getvalue() == "waiting for a server …\n"
