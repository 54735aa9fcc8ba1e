# SPDX-License-Identifier: Apache-2.0
"""Splits ``ACESTEP_AMQP_URL``, and recognises what its parser would misread in silence.

A module of its own, so that the client can use it without reading settings.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Final
from urllib.parse import parse_qs, urlsplit

ENCODING: Final = (
    "in user and password, characters such as # / ? @ : % must be percent-encoded (# is %23, / is %2F, % is %25)"
)

HEARTBEAT: Final = "heartbeat in the URL must be a whole number of seconds, 1 to 65534, or 0 for none (?heartbeat=30)"
_HEARTBEATS: Final = range(65_535)
_NUMBERS: Final = ("happy_eyeballs_delay", "interleave")
_TLS: Final = frozenset({"cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl"})
_READ: Final = frozenset({"heartbeat", "name", "auth", *_TLS, *_NUMBERS})
"""Parameters that aio-pika and aiormq read."""
_ELSEWHERE: Final = {"cacertfile": "cafile"}
"""Names in RabbitMQ's own URLs that are nearer to another one than to what they mean."""

_BETWEEN_URLS: Final = re.compile(r",\s*(?=amqps?://)")
_DECIMAL: Final = re.compile(r"\d+(\.\d+)?", re.ASCII)
_PARTS: Final = re.compile(r"[a-z]+://(?P<authority>[^/?#]*)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)


def split_urls(text: str) -> tuple[str, ...]:
    """Return the URLs of ``ACESTEP_AMQP_URL``, one for each node of a cluster. A comma in a password separates none."""
    return tuple(url.strip() for url in _BETWEEN_URLS.split(text))


def has_raw_login(url: str) -> bool:
    """Whether a ``#``, ``/`` or ``?`` of the password ends the host of this URL too early."""
    parts = _PARTS.match(url)
    return parts is not None and ("#" in parts["rest"] or ("@" in parts["rest"] and "@" not in parts["authority"]))


def problem_of_parameters(url: str) -> str | None:
    """Return what is wrong with what follows the URL's ``?``: a misspelled name, or a value that would be misread.

    aiormq ignores both in silence, and would never notice a dead peer, or accept any certificate.
    """
    given = parse_qs(urlsplit(url).query, keep_blank_values=True)
    for name in given.keys() - _READ:
        if near := _ELSEWHERE.get(name) or _nearest(name):
            return f"the URL's parameter {name} is unknown; did you mean {near}?"
    texts = given.get("heartbeat", [])
    if not all(text.isascii() and text.isdecimal() and int(text) in _HEARTBEATS for text in texts):
        return HEARTBEAT
    if not {"0", "1"}.issuperset(given.get("no_verify_ssl", [])):
        return "no_verify_ssl in the URL must be 0, or 1 to accept any certificate"
    if any(not _DECIMAL.fullmatch(text) for name in _NUMBERS for text in given.get(name, [])):
        return f"{' and '.join(_NUMBERS)} in the URL must be numbers"
    return None


def _nearest(name: str) -> str | None:
    return next(iter(get_close_matches(name.lower().replace("-", "_"), sorted(_READ), n=1, cutoff=0.67)), None)


def warnings_of(url: str) -> Iterator[str]:
    """Yield a warning for each parameter without effect, and for a certificate that is not verified.

    The URL's login is in none of them.
    """
    parts = urlsplit(url)
    given = parse_qs(parts.query, keep_blank_values=True)
    reasons = dict.fromkeys(given.keys() - _READ, "workers do not read it")
    if parts.scheme == "amqp":
        reasons |= dict.fromkeys(given.keys() & _TLS, "amqp:// is a connection without TLS; amqps:// has it")
    elif "1" in given.get("no_verify_ssl", []):
        yield "the broker's certificate is not verified: take no_verify_ssl out of ACESTEP_AMQP_URL"
    for name, reason in sorted(reasons.items()):
        yield f"the parameter {name} of ACESTEP_AMQP_URL has no effect here: {reason}"
