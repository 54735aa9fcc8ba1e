# SPDX-License-Identifier: Apache-2.0
"""Formats dead letters: a row each, or one in full as JSON, with secrets masked.

Their content comes from producers: characters that could control the terminal are replaced.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import JsonValue
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from acestep_consumer.broker.dead_letter_queue import DeadLetter
from acestep_consumer.commands.terminal import UNKNOWN, plural
from acestep_consumer.domain.parse import decompressed, readable_task_id
from acestep_schemas.strict_json import loads

MASK = "***"
MAX_BODY_CHARACTERS = 100_000
MAX_DECOMPRESSED_BYTES = 16 << 20
_DEEPEST = 32
_INDENT = 4
_SECRET_NAME = re.compile(r"passw|secret|token|authori[sz]ation|cookie|credential|signature|api[-_]?key", re.IGNORECASE)
# The password in a URL, and the signature of a presigned one.
_SECRET_TEXT = re.compile(
    r"(?P<keep>://[^\s:/@]*:)[^\s/@]+(?=@)"
    r"|(?P<name>[?&](?:x-amz-(?:signature|credential|security-token)|signature|token|sig|key)=)[^\s&\"']+",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class DeadLetterRow:
    """A dead letter, summarised."""

    task_id: str | None
    message_id: str | None
    code: str
    reason: str
    at: datetime | None
    attempts: int | None
    size: int
    worker: str | None

    @classmethod
    def of(cls, message: DeadLetter) -> "DeadLetterRow":
        """Summarise a dead letter; its task id is the one that a worker would use."""
        death = message.death
        return cls(
            task_id=readable_task_id(message.body, message.message_id, message.body_format),
            message_id=message.message_id,
            code=death.code,
            reason=death.reason,
            at=death.at,
            attempts=death.attempts,
            size=len(message.body),
            worker=death.worker,
        )

    def as_json(self) -> dict[str, JsonValue]:
        """Return the object that ``--json`` prints."""
        return {
            "task_id": self.task_id,
            "message_id": self.message_id,
            "code": self.code,
            "reason": self.reason,
            "at": self.at.isoformat() if self.at else None,
            "attempts": self.attempts,
            "bytes": self.size,
            "worker": self.worker,
        }


def print_row(row: DeadLetterRow, console: Console) -> None:
    """Print a dead letter; its time is in this machine's time zone.

    On a terminal: id, code and time, and below them the reason. Elsewhere: one tab-separated line, for ``grep`` and
    ``cut``: id, code, time, attempts, bytes, reason.
    """
    when = row.at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if row.at else UNKNOWN
    head = _one_line(row.task_id or row.message_id or UNKNOWN), _one_line(row.code), when
    if console.is_terminal:
        console.print(_two_lines(head, row))
    else:
        attempts = str(row.attempts) if row.attempts else UNKNOWN
        console.file.write("\t".join((*head, attempts, str(row.size), _one_line(row.reason))) + "\n")


def _two_lines(head: tuple[str, str, str], row: DeadLetterRow) -> RenderableType:
    letter_id, code, when = head
    first = Text.assemble((letter_id, "cyan"), "  ", (code, "bold"), "  ", when, overflow="fold")
    attempts = f", {plural(row.attempts, 'attempt')}" if row.attempts else ""
    reason = f"{_one_line(row.reason)} ({plural(row.size, 'byte')}{attempts})"
    return Group(first, Padding(Text(reason, overflow="fold"), (0, 0, 0, _INDENT)))


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def in_full(message: DeadLetter) -> dict[str, JsonValue]:
    """Return a dead letter as JSON with secrets masked; a body that is not JSON is text, undecodable bytes escaped.

    Masked are headers and fields whose names suggest a secret, and passwords and signatures in URLs.
    """
    properties = message.properties
    named: dict[str, object] = {
        "content_type": properties.content_type,
        "content_encoding": properties.content_encoding,
        "priority": properties.priority,
        "correlation_id": properties.correlation_id,
        "reply_to": properties.reply_to,
        "timestamp": properties.timestamp,
        "type": properties.message_type,
        "app_id": properties.app_id,
    }
    return {
        **DeadLetterRow.of(message).as_json(),
        "properties": masked({name: value for name, value in named.items() if value not in {None, ""}}),
        "headers": masked(properties.headers or {}),
        "body": masked(_body(message.body, message.body_format.content_encoding)),
    }


def as_text(value: JsonValue) -> str:
    """Return indented JSON for a terminal, not escaped to ASCII, without characters that control the terminal."""
    return printable(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """Replace every non-printable character except newlines."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def masked(value: object, depth: int = 0) -> JsonValue:
    """Convert any AMQP or JSON value to JSON with its secrets masked."""
    match value:
        case Mapping() | list() | tuple() if depth > _DEEPEST:
            return "…"
        case Mapping():
            return {str(name): _masked_item(str(name), item, depth) for name, item in value.items()}
        case list() | tuple():
            return [masked(item, depth + 1) for item in value]
        case None | bool() | int() | float():
            return value
        case bytes() | bytearray():
            value = _text(bytes(value))
        case datetime():
            value = value.isoformat()
    return _SECRET_TEXT.sub(rf"\g<keep>\g<name>{MASK}", str(value))


def _masked_item(name: str, item: object, depth: int) -> JsonValue:
    if isinstance(item, str | bytes | bytearray) and _SECRET_NAME.search(name):
        return MASK
    return masked(item, depth + 1)


def _body(body: bytes, encoding: str | None) -> object:
    try:
        return loads(decompressed(body, encoding, MAX_DECOMPRESSED_BYTES).decode("utf-8-sig")).value
    except ValueError:  # neither JSON nor compressed JSON
        text = _text(body[:MAX_BODY_CHARACTERS])
        left = len(body) - MAX_BODY_CHARACTERS
        return text if left <= 0 else f"{text}… and {left:,} more bytes"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
