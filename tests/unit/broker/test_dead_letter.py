# SPDX-License-Identifier: Apache-2.0
"""Properties of messages, read and written: whatever comes in can be read, and can go out as a dead letter."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import decode
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from acestep_consumer.broker import lenient_codec
from acestep_consumer.broker.dead_letter import dead_letter_properties
from acestep_consumer.domain.errors import MalformedBody

# What the codec hands out for header values; it writes fewer kinds than it reads.
_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(bytearray)
    | st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds are naive
)
_names = st.text(st.characters(codec="ascii", exclude_characters="\x00"), max_size=30)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3), max_leaves=8
)


def written_and_read(properties: Basic.Properties) -> Basic.Properties:
    read = ContentHeader()
    read.unmarshal(ContentHeader(body_size=0, properties=properties).marshal())
    return read.properties


@given(headers=st.dictionaries(_names, _values, max_size=4))
def test_a_dead_letter_can_be_written_whatever_its_headers_hold(headers: dict[str, Any]) -> None:
    kept = dead_letter_properties(Basic.Properties(headers=headers), MalformedBody("no"), "w1")
    read = written_and_read(kept)
    assert read.headers is not None
    assert set(read.headers) == {*headers, "x-acestep-code", "x-acestep-reason", "x-acestep-worker", "x-acestep-time"}


@pytest.mark.parametrize(
    ("value", "kept"), [(2.5, 2.5), (0.1, "0.1"), (1e300, "1e+300"), (math.nan, "nan"), (b"\xff", bytearray(b"\xff"))]
)
def test_a_value_that_the_codec_cannot_write_back_is_kept_in_a_form_that_it_can(value: object, kept: object) -> None:
    headers: dict[str, Any] = {"k": value, "deep": {"list": [value]}}
    letter = dead_letter_properties(Basic.Properties(headers=headers), None, "w1")
    assert letter.headers is not None
    assert (letter.headers["k"], letter.headers["deep"]) == (kept, {"list": [kept]})


@given(st.binary(max_size=255))
def test_any_short_string_can_be_read_and_sent_back(raw: bytes) -> None:
    consumed, text = lenient_codec.short_string(bytes([len(raw)]) + raw + b"rest")
    assert consumed == 1 + len(raw)
    assert len(text.encode()) <= len(raw)
    if "?" not in text:
        assert text.encode() == raw


@given(st.integers(0, 2**64 - 1))
def test_any_timestamp_can_be_read(seconds: int) -> None:
    consumed, time = lenient_codec.timestamp(seconds.to_bytes(8, "big") + b"rest")
    assert consumed == 8
    assert time is None or isinstance(time, datetime)


def test_a_timestamp_of_0_is_none() -> None:
    """Libraries send it for a timestamp that nobody set; as a time it would be 1970, and each deadline long over."""
    lenient_codec.install()
    for seconds, expected in ((0, None), (1, datetime.fromtimestamp(1, UTC))):
        sent = ContentHeader(0, 0, Basic.Properties(timestamp=datetime.fromtimestamp(seconds, UTC)))
        read = ContentHeader()
        read.unmarshal(sent.marshal())
        assert read.properties.timestamp == expected


@given(st.binary(max_size=60))
def test_any_header_table_can_be_read_or_is_marked(raw: bytes) -> None:
    consumed, headers = lenient_codec.table(len(raw).to_bytes(4, "big") + raw)
    assert consumed == 4 + len(raw)
    assert isinstance(headers, dict)


def test_headers_nested_beyond_reason_are_marked() -> None:
    table = b""
    for _ in range(10_000):
        table = b"\x01kF" + len(table).to_bytes(4, "big") + table
    raw = len(table).to_bytes(4, "big") + table
    assert lenient_codec.table(raw) == (len(raw), {lenient_codec.UNREADABLE_HEADERS: True})


def test_installing_reaches_the_codec_and_may_be_repeated() -> None:
    lenient_codec.install()
    lenient_codec.install()
    assert decode.by_type(b"\x04caf\xe9", "shortstr") == (5, "caf?")
    assert decode.by_type((2**63).to_bytes(8, "big"), "timestamp") == (8, None)


@pytest.mark.parametrize(("depth", "readable"), [(31, True), (32, False), (480, False), (20_000, False)])
def test_headers_that_are_nested_too_deep_to_be_written_again_are_not_read(depth: int, *, readable: bool) -> None:
    table = b"\0\0\0\0"
    for _ in range(depth):
        table = (len(table) + 3).to_bytes(4, "big") + b"\x01kF" + table
    consumed, headers = lenient_codec.table(table + b"rest")
    assert consumed == len(table)
    assert (lenient_codec.UNREADABLE_HEADERS not in headers) is readable
