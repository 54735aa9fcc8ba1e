# SPDX-License-Identifier: Apache-2.0
"""Splits ``ACESTEP_AMQP_URL``, and recognises what its parser would misread in silence.

A module of its own, so that the client can use it without reading settings.
"""

import re
from difflib import get_close_matches
from typing import Final
from urllib.parse import parse_qs, urlsplit

ENCODING: Final = (
    "in user and password, characters such as # / ? @ : % must be percent-encoded (# is %23, / is %2F, % is %25)"
)

HEARTBEAT: Final = "heartbeat in the URL must be a whole number of seconds, 1 to 65534, or 0 for none (?heartbeat=30)"
_HEARTBEATS: Final = range(65_535)

_BETWEEN_URLS: Final = re.compile(r",\s*(?=amqps?://)")
_PARTS: Final = re.compile(r"[a-z]+://(?P<authority>[^/?#]*)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)


def split_urls(text: str) -> tuple[str, ...]:
    """Return the URLs of ``ACESTEP_AMQP_URL``, one for each node of a cluster. A comma in a password separates none."""
    return tuple(url.strip() for url in _BETWEEN_URLS.split(text))


def has_raw_login(url: str) -> bool:
    """Whether a ``#``, ``/`` or ``?`` of the password ends the host of this URL too early."""
    parts = _PARTS.match(url)
    return parts is not None and ("#" in parts["rest"] or ("@" in parts["rest"] and "@" not in parts["authority"]))


def has_bad_heartbeat(url: str) -> bool:
    """Whether the URL's ``heartbeat`` is none that AMQP has; aiormq would go without, and never notice a dead peer.

    So is one whose name is misspelled, or has capital letters: aiormq does not read it.
    """
    given = parse_qs(urlsplit(url).query, keep_blank_values=True)
    if any(name != "heartbeat" and get_close_matches(name.lower(), ["heartbeat"], cutoff=0.8) for name in given):
        return True
    texts = given.get("heartbeat", [])
    return not all(text.isascii() and text.isdecimal() and int(text) in _HEARTBEATS for text in texts)
