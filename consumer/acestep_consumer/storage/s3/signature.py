# SPDX-License-Identifier: Apache-2.0
"""Signature Version 4 of a request to S3 whose body's SHA-256 is known.

botocore's takes as long as all the rest of a small request, since it keeps headers as e-mail does, and it would hash
the body again, on the event loop. A test holds the two equal. Keys and presigned URLs come from botocore.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit

from botocore.credentials import ReadOnlyCredentials

_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_SERVICE: Final = "s3"
_END: Final = "aws4_request"
_PORTS: Final = {"http": 80, "https": 443}


class Signer:
    """Signs requests with these keys."""

    def __init__(self, keys: ReadOnlyCredentials, region: str) -> None:
        self._keys = keys
        self._region = region
        self._key_of_day = ("", b"")

    def sign(  # noqa: PLR0913 - the parts of a request
        self,
        method: str,
        url: str,
        sha256: str,
        headers: Mapping[str, str],
        query: Mapping[str, str],
        *,
        now: datetime | None = None,
    ) -> dict[str, str]:
        """Return the headers to send. ``url`` has no query; its path is encoded."""
        parts = urlsplit(url)
        time = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
        sent = {**headers, "X-Amz-Date": time, "X-Amz-Content-SHA256": sha256}
        if self._keys.token:
            sent["X-Amz-Security-Token"] = self._keys.token
        signed = {name.lower(): " ".join(value.split()) for name, value in sent.items()} | {"host": _host(parts)}
        names = sorted(signed)
        canonical = (
            method,
            parts.path,
            encode_query(query),
            *(f"{name}:{signed[name]}" for name in names),
            "",
            ";".join(names),
            sha256,
        )
        scope = f"{time[:8]}/{self._region}/{_SERVICE}/{_END}"
        digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
        to_sign = f"{_ALGORITHM}\n{time}\n{scope}\n{digest}"
        signature = hmac.digest(self._key(time[:8]), to_sign.encode(), "sha256").hex()
        sent["Authorization"] = (
            f"{_ALGORITHM} Credential={self._keys.access_key}/{scope}, SignedHeaders={';'.join(names)}, "
            f"Signature={signature}"
        )
        return sent

    def _key(self, day: str) -> bytes:
        """Return the key for this day, UTC: it is the same for all its requests."""
        known, key = self._key_of_day
        if known != day:
            key = f"AWS4{self._keys.secret_key}".encode()
            for part in (day, self._region, _SERVICE, _END):
                key = hmac.digest(key, part.encode(), "sha256")
            self._key_of_day = day, key
        return key


def encode_query(query: Mapping[str, str]) -> str:
    """Return a query in the canonical order and encoding."""
    pairs = sorted((quote(name, safe="~"), quote(value, safe="~")) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


def _host(parts: SplitResult) -> str:
    """Return the host as a client sends it: with its port, unless it is the scheme's own."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if parts.port in {None, _PORTS.get(parts.scheme)} else f"{host}:{parts.port}"
