# SPDX-License-Identifier: Apache-2.0
"""Splits ``ACESTEP_AMQP_URL``. A module of its own, so that the client can use it without reading settings."""

import re
from typing import Final

_BETWEEN_URLS: Final = re.compile(r",\s*(?=amqps?://)")


def split_urls(text: str) -> tuple[str, ...]:
    """Return the URLs of ``ACESTEP_AMQP_URL``, one for each node of a cluster. A comma in a password separates none."""
    return tuple(url.strip() for url in _BETWEEN_URLS.split(text))
