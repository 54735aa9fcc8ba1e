# SPDX-License-Identifier: Apache-2.0
"""From bytes to a request: task ids, and errors that say what is wrong and whose job it was."""

import gzip
import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acestep_consumer.domain.errors import (
    ConsumerError,
    InvalidRequest,
    MalformedBody,
    MessageTooLarge,
    Unidentified,
    Verdict,
)
from acestep_consumer.domain.job import Request
from acestep_consumer.domain.parse import RequestRules, parse, readable_task_id
from acestep_consumer.domain.ports import BodyFormat

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMIT = 1_000_000
# UUIDv5 of "order 17": part of the contract, as a redelivery to a newer worker must find the same task.
ORDER_17 = "b242620e-6ee4-5c1c-9e56-afd127146162"


RULES = RequestRules(max_bytes=LIMIT)


def packed(encoding: str | None) -> BodyFormat:
    return BodyFormat(content_encoding=encoding)


def read(body: object, message_id: str | None = "m") -> Request:
    return parse(json.dumps(body).encode(), message_id, RULES)


class TestTaskId:
    def test_the_bodys_own_comes_first(self) -> None:
        assert read({"task_id": "mine", "prompt": ""}, "message").task_id == "mine"

    def test_a_fitting_message_id_stands_in(self) -> None:
        assert read({"prompt": ""}, "message-1").task_id == "message-1"

    def test_another_message_id_becomes_the_same_uuid_every_time(self) -> None:
        assert read({"prompt": ""}, "order 17").task_id == ORDER_17
        assert readable_task_id(b"junk", "order 17") == ORDER_17
        assert UUID(ORDER_17).version == 5

    @pytest.mark.parametrize("message_id", ["a b", "m\n", "x" * 129, "é", "\ud800"])
    def test_a_message_id_that_does_not_fit_is_never_used_as_it_is(self, message_id: str) -> None:
        assert UUID(read({"prompt": ""}, message_id).task_id).version == 5

    @pytest.mark.parametrize("missing", [None, ""])
    def test_none_is_made_up_for_a_message_without_any(self, missing: str | None) -> None:
        """It would be another one at each delivery."""
        with pytest.raises(Unidentified):
            read({"prompt": ""}, missing)

    @pytest.mark.parametrize("message_id", ["m", "order 17"])
    def test_the_request_carries_it_too_so_that_it_can_be_sent_again(self, message_id: str) -> None:
        request = read({"prompt": ""}, message_id)
        assert request.body.task_id == request.task_id
        again = read(request.body.model_dump(mode="json"), "another message")
        assert again == request


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


class TestCompression:
    BODY = b'{"task_id": "mine", "prompt": "blues"}'

    @pytest.mark.parametrize(
        ("encoding", "pack"),
        [("gzip", gzip.compress), ("GZIP ", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress),
         ("deflate", raw_deflate)],
    )  # fmt: skip
    def test_gzip_and_both_kinds_of_deflate_are_read(self, encoding: str, pack: Callable[[bytes], bytes]) -> None:
        body = pack(self.BODY)
        assert parse(body, None, RULES, packed(encoding)).body.prompt == "blues"
        assert readable_task_id(body, None, packed(encoding)) == "mine"

    def test_gzip_of_several_members_is_read(self) -> None:
        """Programs that compress as they write make one a flush."""
        body = gzip.compress(self.BODY[:10]) + gzip.compress(b"") + gzip.compress(self.BODY[10:])
        assert parse(body, None, RULES, packed("gzip")).task_id == "mine"

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "utf-8", "identity", "binary", ""])
    def test_an_encoding_that_was_named_and_not_applied_is_no_error(self, encoding: str) -> None:
        assert parse(self.BODY, None, RULES, packed(encoding)).task_id == "mine"

    def test_the_limit_holds_for_what_comes_out_and_no_more_is_unpacked(self) -> None:
        bomb = gzip.compress(b" " * 50_000_000)
        assert len(bomb) < 100_000
        with pytest.raises(MessageTooLarge, match="over the limit once it is decompressed; the limit is 100,000 bytes"):
            parse(bomb, "m", RequestRules(max_bytes=100_000), packed("gzip"))
        assert readable_task_id(bomb, "m", packed("gzip")) == "m"

    @pytest.mark.parametrize(
        ("encoding", "body", "reason"),
        [
            ("gzip", gzip.compress(BODY)[:-4], "content_encoding is gzip, and the body cannot be decompressed: it is"),
            ("gzip", gzip.compress(BODY) + b"more", "cannot be decompressed: incorrect header check"),
            ("gzip", b"\x00\x01", "cannot be decompressed: incorrect header check"),
            ("deflate", b"\xff\xff", "content_encoding is deflate, and the body cannot be decompressed"),
            ("gzip", gzip.compress(b"[]"), "it holds a list"),
            ("br", b"\x0b\x02\x80", "content_encoding 'br' is not supported: send it uncompressed, or with gzip"),
            ("a\x1b" * 90, b"\xff", "content_encoding 'a\\u001b"),
        ],
        ids=["cut off", "other bytes follow", "not gzip", "not deflate", "a list", "brotli", "an odd name"],
    )
    def test_what_cannot_be_unpacked_is_refused_with_the_encodings_name(
        self, encoding: str, body: bytes, reason: str
    ) -> None:
        with pytest.raises(MalformedBody) as caught:
            parse(body, "m", RULES, packed(encoding))
        assert reason in str(caught.value)

    @given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate", "br", None]))
    def test_no_bytes_break_it(self, body: bytes, encoding: str | None) -> None:
        with suppress(ConsumerError):
            parse(body, "m", RULES, packed(encoding))


class TestContentType:
    """What a body is may be said by the message; a JSON object is one whatever is said."""

    FORM = "application/x-www-form-urlencoded"

    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/cloudevents+json",
            "text/plain",
            "x/y",
        ],
    )
    def test_a_json_object_is_read(self, content_type: str | None) -> None:
        assert parse(b'{"prompt": "x"}', "m", RULES, BodyFormat(content_type=content_type)).body.prompt == "x"

    def test_a_form_is_read_and_a_list_may_be_a_name_given_twice(self) -> None:
        body = b"prompt=slow+jazz&bpm=120&thinking=true&track_classes=drums&track_classes=bass&seed="
        request = parse(body, "m", RULES, BodyFormat(content_type=f"{self.FORM};charset=UTF-8"))
        assert (request.body.prompt, request.body.bpm, request.body.thinking) == ("slow jazz", 120, True)
        assert (request.body.track_classes, request.body.seed, request.warnings) == (("drums", "bass"), (), ())
        assert readable_task_id(b"task_id=mine", None, BodyFormat(content_type=self.FORM)) == "mine"

    def test_of_another_field_that_a_form_has_twice_the_last_one_counts(self) -> None:
        written = BodyFormat(content_type=self.FORM)
        request = parse(b"prompt=a&prompt=b&seed=1&seed=2&batch_size=2", "m", RULES, written)
        assert (request.body.prompt, request.body.seed) == ("b", (1, 2))
        assert request.warnings == ("'prompt' is given twice: the last one counts",)

    @pytest.mark.parametrize(
        ("content_type", "body", "reason"),
        [
            ("application/msgpack", b"\x81\xa6prompt\xa1x", "content_type 'application/msgpack' is not supported"),
            ("multipart/form-data; boundary=B", b"--B\r\n", "content_type 'multipart/form-data' is not supported"),
            (FORM, b"prompt=%ff", "the form is not UTF-8"),
            (FORM, b"&".join(b"a=1" for _ in range(1_001)), "the form has more than 1,000 fields"),
        ],
        ids=["msgpack", "multipart", "not UTF-8", "too many"],
    )
    def test_other_types_are_refused_by_name(self, content_type: str, body: bytes, reason: str) -> None:
        with pytest.raises(MalformedBody) as caught:
            parse(body, "m", RULES, BodyFormat(content_type=content_type))
        assert reason in str(caught.value)

    def test_a_request_in_an_envelope_has_its_own_task_id(self) -> None:
        body = b'{"id": "7", "input": {"prompt": "x", "task_id": "mine"}}'
        request = parse(body, "m", RULES)
        assert (request.task_id, request.body.prompt) == ("mine", "x")
        assert request.warnings == ("the request was read from 'input', the body's envelope",)
        assert readable_task_id(body, "m") == "mine"

    def test_a_body_without_a_request_is_invalid_and_says_what_was_seen(self) -> None:
        with pytest.raises(InvalidRequest, match="body = an object with text: must have a field of a request"):
            read({"text": "jazz"})


class TestRefusals:
    def test_size_is_checked_before_anything_is_decoded(self) -> None:
        with pytest.raises(MessageTooLarge, match="101 bytes; the limit is 100"):
            parse(b"\xff" * 101, "m", RequestRules(max_bytes=100))

    def test_a_body_that_fills_the_limit_is_read(self) -> None:
        body = b'{"prompt": "blues"}'
        assert parse(body, "m", RequestRules(max_bytes=len(body))).body.prompt == "blues"

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"", "line 1, column 1"),
            (b"{", "line 1, column 2"),
            (b'{"bpm":\n 9,}', "line 2"),
            (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
            ('{"prompt": "é"}'.encode("utf-16"), "not UTF-8 at byte 0"),
            (b"[]", "holds a list"),
            (b'"text"', "holds a text"),
            (b"7", "holds a number"),
            (b"7.5", "holds a number"),
            (b"true", "holds true or false alone"),
            (b"null", "holds null"),
            (b'{"a":' * 33 + b"1" + b"}" * 33, "nested deeper than 32 levels"),
            (b"[" * 500_000, "nested deeper than 32 levels"),
            (b'{"a": [' + b"0," * 20_001 + b"0]}", "more than 20,000 values"),
        ],
    )
    def test_what_is_no_json_object_is_refused_with_the_place(self, body: bytes, reason: str) -> None:
        with pytest.raises(MalformedBody) as caught:
            parse(body, "m", RULES)
        assert reason in str(caught.value)
        assert caught.value.verdict == Verdict.DEAD_LETTER

    def test_a_broken_field_is_named_with_its_value_and_rule(self) -> None:
        with pytest.raises(InvalidRequest, match="bpm = fast: must be a number") as caught:
            read({"task_id": "mine", "bpm": "fast", "strict": True}, "message")
        assert caught.value.details == ({"field": "bpm", "value": "fast", "rule": "must be a number"},)

    def test_a_broken_task_id_is_a_broken_field(self) -> None:
        with pytest.raises(InvalidRequest, match="task_id = a b"):
            read({"task_id": "a b", "prompt": ""}, "message")

    def test_a_huge_number_is_named_like_any_other_wrong_value(self) -> None:
        with pytest.raises(InvalidRequest, match="bpm"):
            parse(b'{"bpm": ' + b"9" * 100_000 + b"}", "m", replace(RULES, strict=True))


class TestTolerance:
    def test_a_byte_order_mark_is_no_matter(self) -> None:
        assert parse(b'\xef\xbb\xbf{"prompt": "blues"}', "m", RULES).body.prompt == "blues"

    def test_of_a_key_given_twice_the_last_one_counts_and_that_is_said(self) -> None:
        request = parse(b'{"bpm": 90, "prompt": "x", "bpm": 91}', "m", RULES)
        assert request.body.bpm == 91
        assert request.warnings == ("'bpm' is given twice: the last one counts",)

    def test_what_the_reading_warns_of_is_passed_on(self) -> None:
        assert read({"prompt": "", "batchSize": 2}).warnings == (
            "unknown field 'batchSize' is ignored; did you mean 'batch_size'?",
        )


class TestReadableTaskId:
    @pytest.mark.parametrize(
        ("body", "message_id", "expected"),
        [
            (b'{"task_id": "mine", "bpm": "fast"}', "m", "mine"),
            (b'{"task_id": "a b"}', "m", "m"),
            (b'{"task_id": "mine"', "m", "m"),
            (b"[1]", "m", "m"),
            (b"\xff", None, None),
            (b"\xff", "", None),
            (b"{}", None, None),
            (b'{"task_id": "mine", "x": "' + b"y" * 5_000_000 + b'"}', "m", "m"),
        ],
    )
    def test_it_is_the_bodys_else_the_messages_else_none(
        self, body: bytes, message_id: str | None, expected: str | None
    ) -> None:
        assert readable_task_id(body, message_id) == expected


bodies = st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ 019.-eNatrufls\n', max_size=60).map(str.encode)


def attempt(body: bytes, message_id: str | None) -> Request | ConsumerError:
    try:
        return parse(body, message_id, RequestRules(max_bytes=50))
    except (MessageTooLarge, MalformedBody, InvalidRequest) as exc:
        return exc


@patient
@given(bodies, st.none() | st.text(alphabet=st.characters(), max_size=20))
def test_garbage_raises_nothing_but_our_own_errors(body: bytes, message_id: str | None) -> None:
    outcome = attempt(body, message_id)
    expected = readable_task_id(body if len(body) <= 50 else b"", message_id)
    if isinstance(outcome, ConsumerError):
        assert str(outcome).encode()
    else:
        assert expected in (outcome.task_id, None)
