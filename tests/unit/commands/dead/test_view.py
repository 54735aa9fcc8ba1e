# SPDX-License-Identifier: Apache-2.0
"""Dead letters read and shown: which are meant, why they died, what of them goes back, what is masked."""

from __future__ import annotations

import gzip
import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pamqp.commands import Basic
from rich.console import Console

from acestep_consumer.broker.dead_letter import dead_letter_properties, death_of, requeued_properties
from acestep_consumer.broker.dead_letter_queue import DeadLetter
from acestep_consumer.commands.dead.run import DeadLetterFilter, read_since
from acestep_consumer.commands.dead.view import DeadLetterRow, as_text, in_full, masked, print_row
from acestep_consumer.domain.errors import RenderFailed

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DEATH: Any = {"reason": "delivery_limit", "queue": "acestep.generate", "time": NOW, "count": 1}


def row(**values: Any) -> DeadLetterRow:
    fields = {"task_id": "t1", "message_id": "m1", "code": "expired", "reason": "", "at": NOW, "attempts": None}
    return DeadLetterRow(**{**fields, "size": 2, "worker": None, **values})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7 d", 604_800), (" 1m ", 60)]
)
def test_a_span_counts_back_from_now(text: str, seconds: int) -> None:
    assert read_since(text, NOW) == NOW - timedelta(seconds=seconds)


def test_a_time_with_a_zone_is_that_time() -> None:
    assert read_since("2026-03-01T13:00+01:00", NOW) == NOW


@pytest.mark.parametrize("text", ["", "soon", "3 weeks", "-5m", "2026-13-01"])
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="12h"):
        read_since(text, NOW)


@pytest.mark.parametrize(
    ("choice", "fits"),
    [
        (DeadLetterFilter(), True),
        (DeadLetterFilter(id="t1"), True),
        (DeadLetterFilter(id="m1"), True),
        (DeadLetterFilter(id="t2"), False),
        (DeadLetterFilter(id="t1", code="cancelled"), False),
        (DeadLetterFilter(code="expired", since=NOW), True),
        (DeadLetterFilter(since=NOW + timedelta(seconds=1)), False),
    ],
)
def test_a_choice_fits_what_fits_every_part_of_it(choice: DeadLetterFilter, fits: bool) -> None:  # noqa: FBT001 - the expectation
    assert choice.matches(row()) is fits


def test_a_letter_without_a_date_is_older_than_any() -> None:
    assert not DeadLetterFilter(since=NOW - timedelta(days=10_000)).matches(row(at=None))


def test_a_worker_writes_down_code_reason_time_and_tries_and_they_are_read_back() -> None:
    letter = dead_letter_properties(Basic.Properties(headers={"x-delivery-count": 2}), RenderFailed("no sound"), "w1")
    death = death_of(letter.headers or {})
    assert (death.code, death.reason, death.worker, death.attempts) == ("render_failed", "no sound", "w1", 3)
    assert death.at is not None
    assert abs(death.at - datetime.now(UTC)) < timedelta(minutes=1)


def test_what_the_broker_gave_up_is_told_in_its_own_word() -> None:
    death = death_of({"x-death": [DEATH]})
    assert (death.code, death.at) == ("delivery_limit", NOW)
    assert "acestep.generate" in death.reason


@pytest.mark.parametrize("headers", [{}, {"x-death": []}, {"x-death": "no"}, {"x-death": [1]}])
def test_a_letter_that_nobody_explained_is_unknown(headers: dict[str, Any]) -> None:
    assert death_of(headers).code == "unknown"


def test_what_goes_back_is_what_came() -> None:
    came = Basic.Properties(headers={"mine": 0.5, "x-mine": "1"}, message_id="m1", priority=3, expiration="1000")
    letter = dead_letter_properties(came, None, "w1")
    assert letter.headers is not None
    letter.headers |= {"x-death": [DEATH], "x-first-death-queue": "q", "x-delivery-count": 4, "x-acquired-count": 5}
    back = requeued_properties(letter)
    assert back.headers == {"mine": 0.5, "x-mine": "1"}
    assert (back.message_id, back.priority, back.expiration, back.delivery_mode) == ("m1", 3, None, 2)


def test_secrets_are_masked_at_any_depth_and_in_urls() -> None:
    shown = masked(
        {
            "deep": [{"API-Key": "sesame", "password": b"sesame", "max_tokens": 5}],
            "amqp": "amqp://me:sesame@host/",
            "link": "https://host/x?a=1&X-Amz-Signature=sesame&b=2",
        }
    )
    assert "sesame" not in str(shown)
    assert shown == {
        "deep": [{"API-Key": "***", "password": "***", "max_tokens": 5}],
        "amqp": "amqp://me:***@host/",
        "link": "https://host/x?a=1&X-Amz-Signature=***&b=2",
    }


def test_headers_nested_beyond_reason_are_cut() -> None:
    nested: Any = "end"
    for _ in range(1_000):
        nested = [nested]
    assert "end" not in str(masked(nested))


@pytest.mark.parametrize("body", [b"\xff\xfe\x1b[2J", b"{", b"[" * 100_000, b"x" * 300_000])
def test_a_body_that_is_no_json_is_text_that_cannot_command_the_terminal(body: bytes) -> None:
    properties = Basic.Properties(message_id="m1", headers={"x": bytearray(b"\xff")}, timestamp=NOW)
    text = as_text(in_full(DeadLetter(body, properties, death_of({}), 1)))
    assert "\x1b" not in text
    assert '"task_id": "m1"' in text
    assert len(text) < 120_000


REASON = (
    "audio_format = m4a: must be 'mp3', 'wav', 'wav32', 'flac', 'ogg', 'opus' or 'aac'; src_audio_path = /etc/passwd"
)


def test_a_compressed_body_is_shown_as_it_was_with_its_secrets_masked() -> None:
    body = gzip.compress(b'{"task_id": "mine", "password": "x"}')
    found = in_full(DeadLetter(body, Basic.Properties(content_encoding="gzip"), death_of({}), 1))
    assert (found["task_id"], found["body"]) == ("mine", {"task_id": "mine", "password": "***"})
    assert found["properties"] == {"content_encoding": "gzip"}


def test_at_80_columns_no_character_of_a_dead_letter_is_lost() -> None:
    found = row(task_id="9b30df5d-6d89-4065-a054-3c38bfaf2175", code="storage_unavailable", reason=REASON, attempts=2)
    text = io.StringIO()
    print_row(found, Console(file=text, force_terminal=True, width=80, color_system=None))
    first, *rest = (line.rstrip() for line in text.getvalue().splitlines())
    assert first == f"{found.task_id}  {found.code}  {NOW.astimezone():%Y-%m-%d %H:%M:%S}"
    assert all(line.startswith("    ") and len(line) <= 80 for line in rest)
    assert " ".join(line.strip() for line in rest) == f"{REASON} (2 bytes, 2 attempts)"


def test_off_a_terminal_a_dead_letter_is_one_line_of_fields_without_padding() -> None:
    text = io.StringIO()
    print_row(row(reason=f"{REASON}\nand\tmore"), Console(file=text, width=40))
    (line,) = text.getvalue().splitlines()
    when = f"{NOW.astimezone():%Y-%m-%d %H:%M:%S}"
    assert line.split("\t") == ["t1", "expired", when, "–", "2", f"{REASON} and more"]
