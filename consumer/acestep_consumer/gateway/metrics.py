# SPDX-License-Identifier: Apache-2.0
"""Metrics of the gateway, for Prometheus at ``/metrics``."""

import time
from collections.abc import Callable, Iterable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_consumer.gateway.spans import route_of

_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 600)
_OTHER: Final = "other"


class GatewayMetrics:
    """Counts requests by route and status; the rest is read at each scrape.

    Args:
        keys: ``/metrics`` needs a key as other routes do.
        session: the state of the broker.
        routes: the paths of the routes: others are counted as ``other``, since clients make them up.
    """

    def __init__(self, keys: ApiKeyCheck, session: BrokerSession, routes: Iterable[str]) -> None:
        self._keys = keys
        self._routes = frozenset(routes)
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "acestep_gateway_requests", "Requests to the REST API.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "acestep_gateway_request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ("route",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._open = Gauge(
            "acestep_gateway_requests_open",
            "Requests that are being answered, those included that wait for news or stream.",
            registry=self._registry,
        )
        self._gauge("acestep_gateway_broker_up", "Whether the broker is connected.", lambda: float(session.is_up))
        self._gauge("acestep_gateway_queue_size", "Requests that wait.", lambda: float(session.queue_size))

    @property
    def middleware(self) -> Middleware:
        """For the application, around the errors' one."""

        @web.middleware
        async def measure(request: web.Request, handler: Handler) -> web.StreamResponse:
            start = time.perf_counter()
            with self._open.track_inprogress():
                response = await handler(request)
            route = path if (path := route_of(request)) in self._routes else _OTHER
            self._requests.labels(route, str(response.status)).inc()
            self._seconds.labels(route).observe(time.perf_counter() - start)
            return response

        return measure

    async def page(self, request: web.Request) -> web.Response:
        """Send the metrics."""
        self._keys.by_header(request)
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    def _gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        Gauge(name, about, registry=self._registry).set_function(read)
