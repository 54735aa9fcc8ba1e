# SPDX-License-Identifier: Apache-2.0
"""Parses a message into a request, or raises the error that names the fault and the task."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl
from uuid import UUID, uuid5

from acestep_consumer.domain.errors import InvalidRequest, MalformedBody, MessageTooLarge, Unidentified
from acestep_consumer.domain.job import Request
from acestep_consumer.domain.ports import BodyFormat
from acestep_schemas.envelope import open_envelope
from acestep_schemas.lookup import shown
from acestep_schemas.request import RequestInvalid, is_task_id, list_names, parse_request, read_task_id
from acestep_schemas.strict_json import MAX_REPEATED, Document, JsonRefused, loads

# Fixed for good: a message id that cannot be a task id must give the same task on every worker and every redelivery.
_MESSAGE_IDS: Final = UUID("7d1c8a52-93be-4f0c-8d5f-0a6be3b1c947")
# A body beyond this is not searched for a task id: it was refused for its size alone.
_MAX_SEARCHED_BYTES: Final = 4 * 1024 * 1024

FORM: Final = "application/x-www-form-urlencoded"
# Types that say JSON, or nothing.
_JSON: Final = frozenset(
    {"", "application/json", "text/json", "text/plain", "application/octet-stream", "application/x-json"}
)
_MAX_FORM_FIELDS: Final = 1_000

# zlib's window sizes to try. Programs that say "deflate" mean zlib's format or the bare one.
_COMPRESSIONS: Final[dict[str, tuple[int, ...]]] = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
# Values that say nothing about compression; some libraries put the charset here.
_UNCOMPRESSED: Final = frozenset({"", "identity", "none", "binary", "8bit", "utf-8", "utf8", "us-ascii", "ascii"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """The operator's rules for reading requests.

    Attributes:
        max_bytes: larger bodies are refused before they are decoded, and before they are decompressed completely.
        strict: reject every value that breaks a rule, in place of using what ACE-Step would.
        defaults: of fields that a request leaves out.
    """

    max_bytes: int
    strict: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)


PLAIN: Final = BodyFormat()


def parse(body: bytes, message_id: str | None, rules: RequestRules, written: BodyFormat = PLAIN) -> Request:
    """Read one message. The task id is the body's own, else the message id.

    Args:
        body: JSON object in UTF-8, or a form; a byte order mark is tolerated. The object may be in an envelope.
        message_id: AMQP's property; one that does not fit a task id becomes a UUIDv5 of itself.
        rules: the operator's.
        written: how the body is written.

    Raises:
        MessageTooLarge: more than ``max_bytes``.
        MalformedBody: not UTF-8, not JSON, not an object, nested too deep, too many values, or compressed otherwise.
        InvalidRequest: fields that break a rule, all of them; or no field of a request.
        Unidentified: neither the body nor the message has an id.
    """
    if len(body) > rules.max_bytes:
        raise MessageTooLarge(len(body), rules.max_bytes)
    try:
        document = _document(body, written, rules.max_bytes)
        found = open_envelope(_object(document))
    except _TooLarge:
        raise MessageTooLarge(None, rules.max_bytes) from None
    except ValueError as exc:
        raise MalformedBody(f"{exc}{_compression_hint(written.content_encoding)}") from None
    if found.problem is not None:
        raise InvalidRequest((found.problem,))
    try:
        request, warnings = parse_request(found.fields, strict=rules.strict, defaults=rules.defaults)
    except RequestInvalid as exc:
        raise InvalidRequest(exc.problems) from None
    task_id = read_task_id(found.fields) or _task_id_of_message(message_id)
    if task_id is None:
        raise Unidentified
    twice = tuple(f"'{shown(key)}' is given twice: the last one counts" for key in document.repeated)
    return Request(task_id, request.model_copy(update={"task_id": task_id}), twice + found.warnings + warnings)


def readable_task_id(body: bytes, message_id: str | None, written: BodyFormat = PLAIN) -> str | None:
    """The id to report a message under, whatever else is wrong with it: the body's, else the message's, else None."""
    own: str | None = None
    if len(body) <= _MAX_SEARCHED_BYTES:
        try:
            own = read_task_id(open_envelope(_object(_document(body, written, _MAX_SEARCHED_BYTES))).fields)
        except ValueError:
            own = None
    return own or _task_id_of_message(message_id)


class _TooLarge(ValueError):
    """The body is larger than allowed once it is decompressed."""


def decompressed(body: bytes, encoding: str | None, max_bytes: int) -> bytes:
    """Return the body as it was before it was compressed; unknown encodings are ignored.

    Raises:
        ValueError: damaged, or more than ``max_bytes``.
    """
    formats = _COMPRESSIONS.get(_coding(encoding), ())
    reason = ""
    for window_bits in formats:
        try:
            return _inflated(body, window_bits, max_bytes)
        except zlib.error as error:
            reason = str(error).rpartition(": ")[2]
    if formats and not body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):  # some programs name it and do not do it
        raise JsonRefused(f"content_encoding is {_coding(encoding)}, and the body cannot be decompressed: {reason}")
    return body


def _inflated(body: bytes, window_bits: int, max_bytes: int) -> bytes:
    """Decompress one stream, or the members of a gzip file. Raises ``zlib.error``, ``_TooLarge``."""
    found, rest = b"", body
    while rest:
        stream = zlib.decompressobj(window_bits)
        found += stream.decompress(rest, max_bytes + 1 - len(found))
        if len(found) > max_bytes:
            raise _TooLarge
        if not stream.eof:
            raise zlib.error("it is cut off")
        rest = stream.unused_data
    return found


def _coding(encoding: str | None) -> str:
    return (encoding or "").strip().lower()


def _compression_hint(encoding: str | None) -> str:
    """Return what to add to an error where the message names a compression that is not read."""
    coding = _coding(encoding)
    if coding in _UNCOMPRESSED or coding in _COMPRESSIONS:
        return ""
    return f"; content_encoding '{shown(coding)}' is not supported: send it uncompressed, or with gzip or deflate"


def _document(body: bytes, written: BodyFormat, max_bytes: int) -> Document:
    plain = decompressed(body, written.content_encoding, max_bytes)
    media = _media_type(written.content_type)
    is_object = plain.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")  # some programs name another type and send JSON
    if not (is_object or media in _JSON or media.endswith("+json") or media == FORM):
        raise JsonRefused(f"content_type '{shown(media)}' is not supported: send JSON, or {FORM}")
    try:
        text = plain.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise JsonRefused(f"not UTF-8 at byte {exc.start}: {exc.reason}") from None
    return form_document(text) if media == FORM and not is_object else loads(text)


def _media_type(content_type: str | None) -> str:
    return (content_type or "").partition(";")[0].strip().lower()


def form_document(text: str) -> Document:
    """Read a form. Raises ``JsonRefused``."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MAX_FORM_FIELDS)
    except UnicodeDecodeError as exc:
        raise JsonRefused(f"the form is not UTF-8: {exc.reason}") from None
    except ValueError:
        raise JsonRefused(f"the form has more than {_MAX_FORM_FIELDS:,} fields") from None
    return gathered(pairs)


def gathered(pairs: Iterable[tuple[str, str]]) -> Document:
    """Return a form's fields by name. One that is given more than once has a list of values, if it may have one."""
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    several = list_names()
    values = {name: own if len(own) > 1 and name in several else own[-1] for name, own in found.items()}
    repeated = tuple(name for name, own in found.items() if len(own) > 1 and name not in several)
    return Document(values, repeated[:MAX_REPEATED])


def _object(document: Document) -> Mapping[str, object]:
    if isinstance(document.value, dict):
        return document.value
    raise JsonRefused(f"it holds {_JSON_NAMES[type(document.value)]}")


_JSON_NAMES: Final[dict[type, str]] = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false alone",
    type(None): "null",
}


def _task_id_of_message(message_id: str | None) -> str | None:
    if not message_id:
        return None
    if is_task_id(message_id):
        return message_id
    return str(uuid5(_MESSAGE_IDS, message_id.encode("utf-8", "backslashreplace").decode()))
