# SPDX-License-Identifier: Apache-2.0
"""API keys: which key a request was sent with, compared in constant time.

As in ACE-Step's server, ``ai_token`` in a body decides alone where it is given, else the header ``Authorization``, with
or without ``Bearer``.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Final

from aiohttp import web
from pydantic import SecretStr

from acestep_consumer.gateway.answers import ApiError

TOKEN: Final = "ai_token"  # noqa: S105 - a field's name
OPEN: Final = "-"
"""The owner of requests where no key is set."""

_BEARER: Final = "Bearer "
_SHOWN: Final = 8


class ApiKeyCheck:
    """Checks keys. Without any, every request is let in: the gateway listens on this machine alone then."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self.replace(keys)

    def replace(self, keys: Iterable[SecretStr]) -> None:
        """Accept these keys from now on, and no others."""
        self._digests = tuple(_digest(key.get_secret_value()) for key in keys)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._digests)

    def by_header(self, request: web.Request) -> str:
        """Return the owner of a request whose body holds no key. Raises ``ApiError`` (401)."""
        if not self.required:
            return OPEN
        given = request.headers.get("Authorization")
        if given is None:
            raise _unauthorized("Missing Authorization header")
        return self.owner_of(given.removeprefix(_BEARER)) or _refuse("Invalid API key")

    def by_body(self, request: web.Request, body: Mapping[str, object]) -> str:
        """Return the owner of a request, by its body's ``ai_token``, else by its header. Raises ``ApiError`` (401)."""
        if not self.required:
            return OPEN
        token = body.get(TOKEN)
        if token not in (None, ""):
            return self.owner_of(str(token)) or _refuse("Invalid ai_token")
        if "Authorization" not in request.headers:
            raise _unauthorized("Missing ai_token or Authorization header")
        return self.by_header(request)

    def is_key(self, given: str) -> bool:
        """Whether this is one of the keys."""
        return self.owner_of(given) is not None

    def owner_of(self, given: str) -> str | None:
        """Return a name for the key, which is not the key; None: it is none of ours. Each key is compared."""
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:_SHOWN] if any(matches) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()


def _refuse(text: str) -> str:
    raise _unauthorized(text)


def _unauthorized(text: str) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, text, {"WWW-Authenticate": "Bearer"})
