# SPDX-License-Identifier: Apache-2.0
"""RabbitMQ's management API, for the one thing that AMQP cannot do: set a policy."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import re
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from acestep_consumer.broker.faults import BrokerRefused, LinkLost, describe
from acestep_consumer.broker.topology import CAPACITY, GENERATE, capacity_policy

if TYPE_CHECKING:
    from acestep_consumer.settings import BrokerSettings

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
            raise LinkLost(f"no answer from ACESTEP_MANAGEMENT_URL: {describe(error)}") from error
        finally:
            connection.close()
        return _read(answer.status, text)


def _read(status: int, text: bytes) -> Any:
    if status in _REFUSALS:
        raise BrokerRefused(f"ACESTEP_MANAGEMENT_URL: {_REFUSALS[HTTPStatus(status)]}")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise LinkLost(f"ACESTEP_MANAGEMENT_URL answers {status}")
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
