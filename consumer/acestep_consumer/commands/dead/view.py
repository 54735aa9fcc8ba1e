# SPDX-License-Identifier: Apache-2.0
"""Dead letters for eyes and for programs: a row each, or one in full, with secrets masked.

What a stranger sent is shown here. It cannot command the terminal: characters that do not print are replaced.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import JsonValue
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from acestep_consumer.broker.dead_letter_queue import DeadLetter
from acestep_consumer.domain.parse import readable_task_id
from acestep_schemas.strict_json import JsonRefused, loads

MASK = "***"
MAX_BODY_CHARACTERS = 100_000
_DEEPEST = 32
# Columns where no terminal says how many there are.
_WIDE = 1000
_SECRET_NAME = re.compile(r"passw|secret|token|authori[sz]ation|cookie|credential|signature|api[-_]?key", re.IGNORECASE)
# The password in a URL, and what signs one.
_SECRET_TEXT = re.compile(
    r"(?P<keep>://[^\s:/@]*:)[^\s/@]+(?=@)"
    r"|(?P<name>[?&](?:x-amz-(?:signature|credential|security-token)|signature|token|sig|key)=)[^\s&\"']+",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class DeadLetterRow:
    """A dead letter in a line."""

    task_id: str | None
    message_id: str | None
    code: str
    reason: str
    at: datetime | None
    attempts: int | None
    size: int
    worker: str | None

    @classmethod
    def of(cls, letter: DeadLetter) -> "DeadLetterRow":
        """Read a letter; the task id is the one that the worker would use."""
        death = letter.death
        return cls(
            task_id=readable_task_id(letter.body, letter.message_id),
            message_id=letter.message_id,
            code=death.code,
            reason=death.reason,
            at=death.at,
            attempts=death.attempts,
            size=len(letter.body),
            worker=death.worker,
        )

    def as_json(self) -> dict[str, JsonValue]:
        """Return what ``--json`` prints of it."""
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


def console() -> Console:
    """Return where tables go: folded to fit a terminal; elsewhere a letter is a line, for ``grep`` and pagers."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDE)


def table() -> Table:
    """Return the empty table that ``add`` fills."""
    empty = Table(box=box.SIMPLE_HEAD)
    empty.add_column("task id", style="cyan", overflow="fold", min_width=12)
    empty.add_column("code", no_wrap=True)
    empty.add_column("when", no_wrap=True)
    empty.add_column("tries", justify="right")
    empty.add_column("bytes", justify="right")
    empty.add_column("reason", overflow="fold", ratio=1)
    return empty


def add(rows: Table, row: DeadLetterRow) -> None:
    """Add a letter to the table; its time is shown in this machine's zone."""
    when = row.at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if row.at else "–"
    tries = str(row.attempts) if row.attempts else "–"
    texts = (row.task_id or row.message_id or "–", row.code, when, tries, f"{row.size:,}", row.reason)
    rows.add_row(*(Text(printable(text).replace("\n", " ")) for text in texts))


def in_full(letter: DeadLetter) -> dict[str, JsonValue]:
    """Return all of a letter as JSON, secrets masked; a body that is no JSON comes as text, undecodable bytes escaped.

    Secrets are what stands under a telling name, in headers and body, and the password or signature of a URL.
    """
    properties = letter.properties
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
        **DeadLetterRow.of(letter).as_json(),
        "properties": masked({name: value for name, value in named.items() if value not in {None, ""}}),
        "headers": masked(properties.headers or {}),
        "body": masked(_body(letter.body)),
    }


def as_text(value: JsonValue) -> str:
    """Return JSON for a terminal: indented, in its own script, without characters that command it."""
    return printable(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """Return the text with every character that does not print replaced, line ends excepted."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def masked(value: object, depth: int = 0) -> JsonValue:
    """Return any AMQP or JSON value as JSON with its secrets masked."""
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


def _body(body: bytes) -> object:
    try:
        return loads(body.decode("utf-8-sig")).value
    except (JsonRefused, UnicodeDecodeError):
        text = _text(body[:MAX_BODY_CHARACTERS])
        left = len(body) - MAX_BODY_CHARACTERS
        return text if left <= 0 else f"{text}… and {left:,} bytes more"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
