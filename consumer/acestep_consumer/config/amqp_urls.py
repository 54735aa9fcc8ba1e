# SPDX-License-Identifier: Apache-2.0
"""Splits ``ACESTEP_AMQP_URL``, and recognises a login that is not percent-encoded.

A module of its own, so that the client can use it without reading settings.
"""

import re
from typing import Final

ENCODING: Final = (
    "in user and password, characters such as # / ? @ : % must be percent-encoded (# is %23, / is %2F, % is %25)"
)

_BETWEEN_URLS: Final = re.compile(r",\s*(?=amqps?://)")
_PARTS: Final = re.compile(r"[a-z]+://(?P<authority>[^/?#]*)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)


def split_urls(text: str) -> tuple[str, ...]:
    """Return the URLs of ``ACESTEP_AMQP_URL``, one for each node of a cluster. A comma in a password separates none."""
    return tuple(url.strip() for url in _BETWEEN_URLS.split(text))


def has_raw_login(url: str) -> bool:
    """Whether a ``#``, ``/`` or ``?`` of the password ends the host of this URL too early."""
    parts = _PARTS.match(url)
    return parts is not None and ("#" in parts["rest"] or ("@" in parts["rest"] and "@" not in parts["authority"]))
