# SPDX-License-Identifier: Apache-2.0
"""Checks Host and Origin: protects the page from other sites that the same browser has open.

There is no login; the address that the page is bound to keeps other machines out. Against other sites, ``Host`` is
checked (DNS rebinding) and ``Origin`` (cross-site requests), and headers let the page load, run and connect to nothing
but this server.
"""

import ipaddress
import socket
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from yarl import URL

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_READING: Final = frozenset({"GET", "HEAD"})


def is_loopback(host: str) -> bool:
    """Whether a server that is bound to ``host`` is reachable from this machine alone."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


class OriginCheck:
    """Checks where requests come from.

    Args:
        bound: the address that the server listens on.
        names: more host names of the page, for instance behind a proxy.
    """

    def __init__(self, bound: str, names: Iterable[str] = ()) -> None:
        self._loopback_only = is_loopback(bound)
        self._names = {"localhost", bound.lower(), *(name.lower() for name in names)}
        if not self._loopback_only:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    @property
    def middleware(self) -> Middleware:
        """For the application."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            why = self.refusal(request.method, request.headers.get("Host", ""), request.headers.get("Origin"))
            if why is not None:
                return web.Response(status=HTTPStatus.FORBIDDEN, text=f"{why}\n")
            return await handler(request)

        return check

    def refusal(self, method: str, host: str, origin: str | None) -> str | None:
        """Return why a request is refused; None when it is not."""
        if not self._is_allowed(host):
            return f"{host[:100]!r} is not a host name of this page; start it with --name to allow one"
        return foreign_refusal(method, host, origin)

    def _is_allowed(self, host: str) -> bool:
        name = _host_of(f"//{host}")
        if name is None:
            return False
        address = _address(name)
        if address is None:
            return name in self._names
        # An address, other than a name, cannot be pointed at this server by somebody else.
        return address.is_loopback or not self._loopback_only


async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """For the application's ``on_response_prepare``."""
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")


def foreign_refusal(method: str, host: str, origin: str | None) -> str | None:
    """Return why a request is refused that changes something and comes from another site; None when it is not."""
    if method not in _READING and not _same(origin, host):
        return "only the page itself may send this request"
    return None


def _same(origin: str | None, host: str) -> bool:
    return origin is not None and origin.partition("://")[2] == host


def _host_of(url: str) -> str | None:
    try:
        return (URL(url).host or "").lower() or None
    except ValueError:
        return None


@lru_cache(maxsize=256)
def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
