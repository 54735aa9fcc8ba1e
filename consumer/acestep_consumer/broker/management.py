# SPDX-License-Identifier: Apache-2.0
"""RabbitMQ's management API, for the one thing that AMQP cannot do: set a policy."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import re
import ssl
from base64 import b64encode
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import SplitResult, quote, unquote, urlsplit

import aiohttp
from yarl import URL

from acestep_consumer.broker.errors import BrokerRefused, ConnectionLost, describe
from acestep_consumer.broker.topology import CAPACITY, GENERATE, capacity_policy

if TYPE_CHECKING:
    from acestep_consumer.config.settings import BrokerSettings

TIMEOUT_S = 10.0
_GUEST = ("guest", "guest")
_QUEUES = {"all", "queues", "classic_queues", "quorum_queues"}
_REFUSALS = {
    HTTPStatus.UNAUTHORIZED: "it refuses the login: put user and password into ACESTEP_MANAGEMENT_URL, or give the "
    "user of ACESTEP_AMQP_URL the tag policymaker (rabbitmqctl set_user_tags USER policymaker)",
    HTTPStatus.FORBIDDEN: "the user needs the tag policymaker and permission on the virtual host",
    HTTPStatus.NOT_FOUND: "it knows no such virtual host, or it is no management API",
}


def vhost_of(settings: BrokerSettings) -> str:
    """Return the virtual host that ``ACESTEP_AMQP_URL`` names."""
    return unquote(urlsplit(settings.url.get_secret_value()).path.removeprefix("/")) or "/"


class Management:
    """The API at ``ACESTEP_MANAGEMENT_URL``. Without a user in there, the login is that of ``ACESTEP_AMQP_URL``."""

    def __init__(self, settings: BrokerSettings) -> None:
        if settings.management_url is None:
            raise ValueError("ACESTEP_MANAGEMENT_URL is not set")
        self._url = urlsplit(settings.management_url.get_secret_value())
        self._vhost = vhost_of(settings)
        self._login = _login(self._url) or _login(urlsplit(settings.url.get_secret_value())) or _GUEST

    async def set_limit(self, limit: int) -> None:
        """Let the request queue hold ``limit`` messages from now on; what it holds already stays.

        Raises:
            BrokerRefused: the user may not, or another policy would be put out of force.
            LinkLost: the API is out of reach.
        """
        await asyncio.to_thread(self._set_limit, limit)

    def _set_limit(self, limit: int) -> None:
        vhost = quote(self._vhost, safe="")
        for other in self._call("GET", f"/api/policies/{vhost}") or ():
            if _rivals(other):
                raise BrokerRefused(
                    f"the policy {other['name']!r} covers {GENERATE} too, and RabbitMQ applies only one to a queue: "
                    f'add "max-length": {limit} to that one and unset ACESTEP_MANAGEMENT_URL, or narrow its pattern '
                    f"{other['pattern']!r}"
                )
        self._call("PUT", f"/api/policies/{vhost}/{CAPACITY}", capacity_policy(limit).as_body())

    def _call(self, method: str, path: str, body: object = None) -> Any:
        user = base64.b64encode(":".join(self._login).encode()).decode()
        headers = {"Authorization": f"Basic {user}", "Content-Type": "application/json"}
        connection = _connection(self._url)
        try:
            connection.request(method, self._url.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read()
        except ssl.SSLCertVerificationError as error:
            raise BrokerRefused(f"ACESTEP_MANAGEMENT_URL: {error}: trust its certificate (SSL_CERT_FILE)") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLost(f"no answer from ACESTEP_MANAGEMENT_URL: {describe(error)}") from error
        finally:
            connection.close()
        return _read(answer.status, text)


def _read(status: int, text: bytes) -> Any:
    if status in _REFUSALS:
        raise BrokerRefused(f"ACESTEP_MANAGEMENT_URL: {_REFUSALS[HTTPStatus(status)]}")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise ConnectionLost(f"ACESTEP_MANAGEMENT_URL answers {status}")
    if status >= HTTPStatus.MULTIPLE_CHOICES:
        raise BrokerRefused(f"ACESTEP_MANAGEMENT_URL answers {status}: {text[:200].decode(errors='replace')}")
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise BrokerRefused("ACESTEP_MANAGEMENT_URL answers with no JSON: is it the management API?") from error


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    if url.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(url.hostname or "", url.port, timeout=TIMEOUT_S, context=context)
    return http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)


def _login(url: SplitResult) -> tuple[str, str] | None:
    return (unquote(url.username), unquote(url.password or "")) if url.username else None


def _rivals(other: dict[str, Any]) -> bool:
    """Whether this policy covers the request queue and is not ours."""
    if other["name"] == CAPACITY or other.get("apply-to", "all") not in _QUEUES:
        return False
    try:
        return re.search(other["pattern"], GENERATE) is not None
    except re.error:  # the broker reads another dialect: what it makes of this one shows when the limit is measured
        return False


if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType

    from acestep_consumer.config.settings import BrokerSettings

TIMEOUT_S = 5.0
# How the worker calls the connection that it consumes on: "acestep-consumer ID consume".
_NAMED, _CONSUMES = "acestep-consumer ", " consume"
# The rate at this moment says little of jobs that take minutes.
_RATES = "msg_rates_age=300&msg_rates_incr=10"
_REFUSALS = {
    HTTPStatus.UNAUTHORIZED: "it refuses the login: put user and password into ACESTEP_MANAGEMENT_URL, or give the "
    "user of ACESTEP_AMQP_URL the tags monitoring and policymaker (rabbitmqctl set_user_tags USER monitoring "
    "policymaker)",
    HTTPStatus.FORBIDDEN: "the user may not look there: it needs the tag monitoring (or management)",
    HTTPStatus.NOT_FOUND: "it knows no such virtual host or queue, or it is no management API",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerInfo:
    """One worker's consumers of the request queue: who it is, and how many messages it may hold."""

    worker_id: str
    prefetch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestQueue:
    """The request queue as the management API sees it, some seconds ago.

    Attributes:
        ready: messages that wait.
        unacked: messages in workers' hands.
        acked_per_s: how many were acked a second, over the last five minutes; None: not known yet.
        limit: how many may wait, from the queue's argument and its policies; None: no limit.
        consumers: who consumes, by worker.
    """

    ready: int
    unacked: int
    acked_per_s: float | None
    limit: int | None
    consumers: tuple[ConsumerInfo, ...]


class Monitor:
    """The API at ``ACESTEP_MANAGEMENT_URL``, which must be set. An async context manager.

    Every call raises ``ConnectionLost`` when the API is out of reach, and ``BrokerRefused`` when it says no.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        if settings.management_url is None:
            raise ValueError("ACESTEP_MANAGEMENT_URL is not set")
        url = URL(settings.management_url.get_secret_value())
        amqp = URL(settings.url.get_secret_value())
        login = url if url.user else amqp
        self._base = str(url.with_user(None).with_path("")).rstrip("/") + url.path.rstrip("/")
        self._vhost = quote(vhost_of(settings), safe="")
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Basic {_encoded(login)}"},
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        )
        self.time: datetime | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def tags(self) -> frozenset[str]:
        """Return the user's tags, such as ``policymaker``."""
        tags = (await self._get("/api/whoami"))["tags"]
        return frozenset(tags.split(",") if isinstance(tags, str) else tags)

    async def bindings(self) -> frozenset[tuple[str, str, str]]:
        """Return (exchange, queue, routing key) of all bindings in the virtual host."""
        found = await self._get(f"/api/bindings/{self._vhost}")
        return frozenset((each["source"], each["destination"], each["routing_key"]) for each in found)

    async def request_queue(self) -> RequestQueue:
        """Return what is known of the request queue and its consumers."""
        queue = await self._get(f"/api/queues/{self._vhost}/{GENERATE}?{_RATES}")
        names = await self._names()
        return _request_queue(queue, names)

    async def _names(self) -> dict[str, str]:
        """Connections by the broker's name for them; their own name is what a worker can be told by."""
        try:
            found = await self._get(f"/api/vhosts/{self._vhost}/connections")
        except BrokerRefused:  # a user with the tag management sees no other users' connections
            return {}
        return {each["name"]: (each.get("client_properties") or {}).get("connection_name", "") for each in found}

    async def _get(self, path: str) -> Any:
        try:
            # Encoded already: the name of a virtual host may hold slashes.
            async with self._session.get(URL(self._base + path, encoded=True)) as answer:
                self.time = _time(answer.headers.get("Date"))
                if answer.status in _REFUSALS:
                    raise BrokerRefused(f"ACESTEP_MANAGEMENT_URL: {_REFUSALS[HTTPStatus(answer.status)]}")
                if answer.status != HTTPStatus.OK:
                    raise ConnectionLost(f"ACESTEP_MANAGEMENT_URL answers {answer.status}")
                return await answer.json(content_type=None)
        except aiohttp.ClientConnectorCertificateError as error:
            raise BrokerRefused("ACESTEP_MANAGEMENT_URL: its certificate is not trusted (SSL_CERT_FILE)") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionLost(f"no answer from ACESTEP_MANAGEMENT_URL: {describe(error)}") from error
        except ValueError as error:
            raise BrokerRefused("ACESTEP_MANAGEMENT_URL answers with no JSON: is it the management API?") from error


def _encoded(login: URL) -> str:
    return b64encode(f"{login.user or 'guest'}:{login.password or 'guest'}".encode()).decode()


def _request_queue(queue: dict[str, Any], names: dict[str, str]) -> RequestQueue:
    rates = queue.get("message_stats") or {}
    return RequestQueue(
        ready=queue.get("messages_ready", 0),
        unacked=queue.get("messages_unacknowledged", 0),
        acked_per_s=(rates.get("ack_details") or {}).get("avg_rate"),
        limit=_limit(queue),
        consumers=_consumers(queue.get("consumer_details") or (), names),
    )


def _limit(queue: dict[str, Any]) -> int | None:
    """Where several limits stand, the smallest counts."""
    argument = queue.get("arguments", {}).get("x-max-length")
    policy = (queue.get("effective_policy_definition") or {}).get("max-length")
    return min((each for each in (argument, policy) if each is not None), default=None)


def _consumers(details: Any, names: dict[str, str]) -> tuple[ConsumerInfo, ...]:
    """A worker that changes its prefetch has several consumers for a while, whose shares add up."""
    shares: dict[str, int] = {}
    for each in details:
        connection = (each.get("channel_details") or {}).get("connection_name", "")
        worker = _worker(names.get(connection, ""), connection)
        shares[worker] = shares.get(worker, 0) + each.get("prefetch_count", 0)
    return tuple(ConsumerInfo(worker_id=worker, prefetch=share) for worker, share in sorted(shares.items()))


def _worker(name: str, connection: str) -> str:
    if name.startswith(_NAMED) and name.endswith(_CONSUMES):
        return name[len(_NAMED) : -len(_CONSUMES)]
    return name or connection


def _time(header: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(header) if header else None
    except ValueError:
        return None
