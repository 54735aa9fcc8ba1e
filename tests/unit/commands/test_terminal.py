# SPDX-License-Identifier: Apache-2.0
import pytest

from acestep_consumer.commands.terminal import UNKNOWN, number, seconds, share, size


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
