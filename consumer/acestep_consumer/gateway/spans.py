# SPDX-License-Identifier: Apache-2.0
"""Spans of requests, and the ``traceparent`` that a client sent."""

import re
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from acestep_consumer.observability.tracing import http_request_span, note_http_status

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_UNTRACED: Final = frozenset({"/health", "/healthz", "/readyz", "/metrics"})
"""Asked for all the time, by probes."""

PREFIX: Final = "/api"
"""Before each path, too: ACE-Step's own web page asks for `/api/v1/models`."""


def traceparent_of(request: web.Request) -> str | None:
    """Return the trace that a request belongs to (W3C Trace Context); None: none, or its header is malformed."""
    given = request.headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None


def route_of(request: web.Request) -> str:
    """Return the template of a request's path, as documented; empty where there is no such route."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical.removeprefix(PREFIX)


@web.middleware
async def trace_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run each request of a route in a span of its own."""
    route = route_of(request)
    if not route or route in _UNTRACED:
        return await handler(request)
    with http_request_span(request.method, route, traceparent_of(request)):
        response = await handler(request)
        note_http_status(response.status)
        return response
