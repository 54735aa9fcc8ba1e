# SPDX-License-Identifier: Apache-2.0
"""RabbitMQ's management API: sets the policy that holds the queue's limit, and reads what AMQP does not tell."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, unquote, urlsplit

from yarl import URL

from acestep_consumer.broker.errors import BrokerRefused, ConnectionLost, describe
from acestep_consumer.broker.topology import CAPACITY, GENERATE, capacity_policy, consumer_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    import aiohttp

    from acestep_consumer.config.settings import BrokerSettings

READ_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 10.0
# Averaged over five minutes: the momentary rate says little about jobs that take minutes.
_RATES = "msg_rates_age=300&msg_rates_incr=10"
_POLICY_COLUMNS = "name,type,arguments,policy,operator_policy,effective_policy_definition"
_APPLIES_TO_QUEUES = {"all", "queues", "classic_queues", "quorum_queues"}
_REFUSALS = {
    HTTPStatus.UNAUTHORIZED: "it refuses the login: put user and password into ACESTEP_MANAGEMENT_URL, or give the "
    "user of ACESTEP_AMQP_URL the tags monitoring and policymaker (rabbitmqctl set_user_tags USER monitoring "
    "policymaker)",
    HTTPStatus.FORBIDDEN: "the user may not do that: reading needs the tag monitoring (or management), setting the "
    "limit the tag policymaker, and both need permission on the virtual host",
    HTTPStatus.NOT_FOUND: "it knows no such virtual host or queue, or it is no management API",
}

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerInfo:
    """One worker's consumers of the request queue, how many they are and how many unacked messages they may hold."""

    worker_id: str
    prefetch: int
    consumers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestQueue:
    """The request queue as the management API sees it; its figures are some seconds old.

    Attributes:
        ready: messages that wait.
        unacked: messages delivered to workers and not yet acked.
        acked_per_s: messages acked a second, over the last five minutes; None: not known yet.
        limit: how many messages may wait, from the queue's argument and its policies; None: no limit.
        consumers: the consumers, by worker; a new one is missing for some seconds.
    """

    ready: int
    unacked: int
    acked_per_s: float | None
    limit: int | None
    consumers: tuple[ConsumerInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy:
    """Settings of a queue that come from policies.

    Attributes:
        name: the queue's.
        kind: ``classic``, ``quorum`` or ``stream``.
        arguments: those that it was declared with.
        policy: the arguments of the policy and the operator policy that the broker applies, some seconds old.
        policies: the names of these two.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    policy: Mapping[str, Any]
    policies: tuple[str, ...]


def vhost_of(settings: BrokerSettings) -> str:
    """Return the virtual host that ``ACESTEP_AMQP_URL`` names."""
    return unquote(urlsplit(settings.url.get_secret_value()).path.removeprefix("/")) or "/"


class ManagementClient:
    """A client of the API at ``ACESTEP_MANAGEMENT_URL``, which must be set. An async context manager.

    Where that URL has no user in it, the login is that of ``ACESTEP_AMQP_URL``. Every call raises ``ConnectionLost``
    when the API is out of reach, and ``BrokerRefused`` when it refuses.
    """

    def __init__(self, settings: BrokerSettings, *, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        if settings.management_url is None:
            raise ValueError("ACESTEP_MANAGEMENT_URL is not set")
        url, amqp = URL(settings.management_url.get_secret_value()), URL(settings.url.get_secret_value())
        self._login = _login(url) or _login(amqp) or "guest:guest"
        self._base = str(url.origin()) + url.raw_path.rstrip("/")
        self._vhost = quote(vhost_of(settings), safe="")
        self._read_timeout_s = read_timeout_s
        self._session: aiohttp.ClientSession
        self.time: datetime | None = None
        """The broker's clock, in UTC, as the latest answer gave it."""

    async def __aenter__(self) -> Self:
        # aiohttp takes a fifth of a second to import, and most who import this file ask no API.
        import aiohttp  # noqa: PLC0415 - as said

        from acestep_consumer.config.http import open_session  # noqa: PLC0415 - as said

        login = b64encode(self._login.encode()).decode()
        # Certificates take longer to read than an answer takes to come.
        plain = aiohttp.TCPConnector() if self._base.startswith("http:") else None
        self._session = open_session(plain, headers={"Authorization": f"Basic {login}"})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def set_limit(self, limit: int) -> None:
        """Let the request queue hold ``limit`` messages from now on; messages that it holds already stay.

        Refused as well where this would put another policy out of force.
        """
        await self.refuse_other_policies(limit)
        await self.call("PUT", f"/api/policies/{self._vhost}/{CAPACITY}", capacity_policy(limit).as_body())

    async def refuse_other_policies(self, limit: int) -> None:
        """Raise ``BrokerRefused`` where another policy covers the request queue, so that ours cannot."""
        for policy in await self.call("GET", f"/api/policies/{self._vhost}") or ():
            if _conflicts(policy):
                raise BrokerRefused(
                    f"the policy {policy['name']!r} covers {GENERATE} too, and RabbitMQ applies only one to a queue: "
                    f'add "max-length": {limit} to that one and unset ACESTEP_MANAGEMENT_URL, or narrow its pattern '
                    f"{policy['pattern']!r}"
                )

    async def tags(self) -> frozenset[str]:
        """Return the user's tags, such as ``policymaker``."""
        tags = (await self.call("GET", "/api/whoami"))["tags"]
        return frozenset(tags.split(",") if isinstance(tags, str) else tags)

    async def bindings(self) -> frozenset[tuple[str, str, str]]:
        """Return (exchange, queue, routing key) of all bindings in the virtual host."""
        found = await self.call("GET", f"/api/bindings/{self._vhost}")
        return frozenset((each["source"], each["destination"], each["routing_key"]) for each in found)

    async def queue_policies(self) -> tuple[QueuePolicy, ...]:
        """Return what policies say about the queues in the virtual host; nothing on those seconds old."""
        found = await self.call("GET", f"/api/queues/{self._vhost}?columns={_POLICY_COLUMNS}")
        return tuple(_queue_policy(each) for each in found if each.get("effective_policy_definition") is not None)

    async def request_queue(self) -> RequestQueue:
        """Return the depth, rate, limit and consumers of the request queue."""
        queue = await self.call("GET", f"/api/queues/{self._vhost}/{GENERATE}?{_RATES}")
        return _request_queue(queue, await self._connection_names())

    async def _connection_names(self) -> dict[str, str]:
        """Map the broker's name of each connection to the client's own, which holds the worker's id."""
        try:
            found = await self.call("GET", f"/api/vhosts/{self._vhost}/connections")
        except BrokerRefused:  # a user with the tag management sees no other users' connections
            return {}
        return {each["name"]: (each.get("client_properties") or {}).get("connection_name", "") for each in found}

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Send one request and return the answer's JSON; None when it has no body.

        Args:
            method: ``GET``, ``PUT``, ``POST`` or ``DELETE``.
            path: as in RabbitMQ's documentation, percent-encoded, such as ``/api/queues/%2F``.
            body: sent as JSON; None: no body.
        """
        import aiohttp  # noqa: PLC0415 - as above

        from acestep_consumer.config.http import NETWORK_ERRORS  # noqa: PLC0415 - as above

        timeout = aiohttp.ClientTimeout(total=self._read_timeout_s if method == "GET" else WRITE_TIMEOUT_S)
        # Encoded already: the name of a virtual host may hold slashes.
        url = URL(self._base + path, encoded=True)
        # A stream: aiohttp warns of large bodies in one piece.
        data = None if body is None else BytesIO(json.dumps(body).encode())
        try:
            async with self._session.request(
                method, url, data=data, headers=_JSON, timeout=timeout, allow_redirects=False
            ) as answer:
                self.time = _time(answer.headers.get("Date"))
                return _read(answer.status, await answer.read())
        except aiohttp.ClientConnectorCertificateError as error:
            raise BrokerRefused("ACESTEP_MANAGEMENT_URL: trust its certificate (SSL_CERT_FILE)") from error
        except aiohttp.ClientConnectorSSLError as error:
            raise ConnectionLost("ACESTEP_MANAGEMENT_URL: no TLS there; http:// is without") from error
        except aiohttp.ClientResponseError as error:
            raise ConnectionLost("ACESTEP_MANAGEMENT_URL: no HTTP there; the port is 15672") from error
        except NETWORK_ERRORS as error:
            raise ConnectionLost(f"no answer from ACESTEP_MANAGEMENT_URL: {describe(error)}") from error


def _login(url: URL) -> str | None:
    return f"{url.user}:{url.password or ''}" if url.user else None


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


def _time(header: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(header) if header else None
    except ValueError:
        return None


def _conflicts(policy: dict[str, Any]) -> bool:
    """Whether this policy covers the request queue and is not ours."""
    if policy["name"] == CAPACITY or policy.get("apply-to", "all") not in _APPLIES_TO_QUEUES:
        return False
    try:
        return re.search(policy["pattern"], GENERATE) is not None
    except re.error:  # RabbitMQ's dialect differs; whether the pattern matches shows when the limit is measured
        return False


def _request_queue(queue: dict[str, Any], names: dict[str, str]) -> RequestQueue:
    rates = queue.get("message_stats") or {}
    return RequestQueue(
        ready=queue.get("messages_ready", 0),
        unacked=queue.get("messages_unacknowledged", 0),
        acked_per_s=(rates.get("ack_details") or {}).get("avg_rate"),
        limit=_limit(queue),
        consumers=_consumers(queue.get("consumer_details") or (), names),
    )


def _queue_policy(queue: dict[str, Any]) -> QueuePolicy:
    return QueuePolicy(
        name=queue["name"],
        kind=queue.get("type") or "classic",
        arguments=queue.get("arguments") or {},
        policy=queue["effective_policy_definition"],
        policies=tuple(name for key in ("policy", "operator_policy") if (name := queue.get(key))),
    )


def _limit(queue: dict[str, Any]) -> int | None:
    """Return the smallest of the limits that apply."""
    argument = queue.get("arguments", {}).get("x-max-length")
    policy = (queue.get("effective_policy_definition") or {}).get("max-length")
    return min((each for each in (argument, policy) if each is not None), default=None)


def _consumers(details: Any, names: dict[str, str]) -> tuple[ConsumerInfo, ...]:
    """Add up the prefetch of each worker's consumers: one that changes its prefetch has several for a while."""
    prefetch: dict[str, list[int]] = {}
    for each in details:
        connection = (each.get("channel_details") or {}).get("connection_name", "")
        worker = consumer_of(names.get(connection, "")) or names.get(connection) or connection
        prefetch.setdefault(worker, []).append(each.get("prefetch_count", 0))
    return tuple(
        ConsumerInfo(worker_id=worker, prefetch=sum(counts), consumers=len(counts))
        for worker, counts in sorted(prefetch.items())
    )
