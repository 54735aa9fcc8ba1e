# SPDX-License-Identifier: Apache-2.0
"""Which web pages may use the API: CORS as ACE-Step's server has it, and protection where no key is set.

Without a key, any page in a browser on this machine could send requests: a form needs no CORS. So ``Host`` is checked
then, against DNS rebinding, and requests of foreign pages are refused. Where a key is set, a page would need it.
"""

import re
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from acestep_consumer.gateway.answers import REQUEST_ID, problem
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.webui.origin_check import OriginCheck

METHODS: Final = "GET, POST, DELETE, OPTIONS"
HEADERS: Final = f"Authorization, Content-Type, Idempotency-Key, Range, {REQUEST_ID}"
_EXPOSED: Final = f"Content-Range, Retry-After, {REQUEST_ID}"
_MAX_AGE_S: Final = 600

_LOCAL: Final = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")

OnPrepare = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


class OriginPolicy:
    """Checks ``Origin`` and, without a key, ``Host``.

    Args:
        keys: whether a key is required.
        hosts: checks ``Host``.
        origins: pages that may use the API besides those of this machine; ``null`` is that of a file.
    """

    def __init__(self, keys: ApiKeyCheck, hosts: OriginCheck, origins: Iterable[str] = ()) -> None:
        self._keys = keys
        self._hosts = hosts
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    @property
    def middleware(self) -> Middleware:
        """For the application."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return self._preflight(request)
            if (refused := self._refusal(request)) is not None:
                return problem(HTTPStatus.FORBIDDEN, refused)
            return await handler(request)

        return check

    @property
    def on_prepare(self) -> OnPrepare:
        """For the application's ``on_response_prepare``: lets allowed pages read the answer."""

        async def add(request: web.Request, response: web.StreamResponse) -> None:
            response.headers.setdefault("Cache-Control", "no-store")
            response.headers["X-Content-Type-Options"] = "nosniff"
            origin = request.headers.get("Origin")
            if origin is not None:
                response.headers["Vary"] = "Origin"
            if origin is not None and self._is_allowed(origin):
                response.headers["Access-Control-Allow-Origin"] = origin
                response.headers["Access-Control-Expose-Headers"] = _EXPOSED

        return add

    def _refusal(self, request: web.Request) -> str | None:
        if self._keys.required:
            return None
        origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
        if self._hosts.refusal("GET", host, None) is not None:
            return "without an API key, this server answers on this machine alone: set ACESTEP_API_KEY"
        if origin is not None and not self._is_allowed(origin):
            return "this page may not use the API: add its origin to ACESTEP_API_ORIGINS"
        return None

    def _preflight(self, request: web.Request) -> web.Response:
        if not self._is_allowed(request.headers.get("Origin", "")):
            return web.Response(status=HTTPStatus.BAD_REQUEST, text="Disallowed CORS origin")
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": HEADERS,
            "Access-Control-Max-Age": str(_MAX_AGE_S),
        }
        return web.Response(text="OK", headers=headers)

    def _is_allowed(self, origin: str) -> bool:
        return bool(_LOCAL.fullmatch(origin)) or origin.lower() in self._origins
