# SPDX-License-Identifier: Apache-2.0
"""What the management API is asked, and how its answers are read."""

from __future__ import annotations

from typing import Any

import pytest

from acestep_consumer.broker.errors import BrokerRefused, ConnectionLost
from acestep_consumer.broker.management import ManagementClient, _conflicts, _read, vhost_of
from acestep_consumer.broker.topology import CAPACITY
from acestep_consumer.config.settings import SettingsError, load
from tests.support.broker import broker_settings


@pytest.mark.parametrize(
    ("url", "vhost"),
    [
        ("amqp://host", "/"),
        ("amqp://host/", "/"),
        ("amqp://host/%2F", "/"),
        ("amqp://host/music", "music"),
        ("amqps://a:b@host:5671/my%20songs?heartbeat=5", "my songs"),
    ],
)
def test_the_virtual_host_is_that_of_the_connection(url: str, vhost: str) -> None:
    assert vhost_of(broker_settings(url)) == vhost


@pytest.mark.parametrize(
    ("url", "login"),
    [
        ("http://host:15672", "me:p@ss"),
        ("http://admin:s%2Fe@host:15672", "admin:s/e"),
    ],
)
def test_the_login_is_the_apis_own_or_else_the_connections(url: str, login: str) -> None:
    assert ManagementClient(broker_settings("amqp://me:p%40ss@host/", management_url=url))._login == login


@pytest.mark.parametrize(
    ("policy", "conflicts"),
    [
        ({"name": "ha", "pattern": ".*", "apply-to": "all"}, True),
        ({"name": "ha", "pattern": "^acestep", "apply-to": "queues"}, True),
        ({"name": CAPACITY, "pattern": ".*", "apply-to": "queues"}, False),
        ({"name": "ha", "pattern": ".*", "apply-to": "exchanges"}, False),
        ({"name": "ha", "pattern": r"^acestep\.events", "apply-to": "queues"}, False),
        ({"name": "odd", "pattern": "(?<", "apply-to": "queues"}, False),
    ],
)
def test_a_conflict_is_another_policy_that_covers_the_request_queue(policy: dict[str, Any], conflicts: bool) -> None:  # noqa: FBT001 - the expectation
    assert _conflicts(policy) is conflicts


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (401, b"", BrokerRefused),
        (403, b"", BrokerRefused),
        (404, b"", BrokerRefused),
        (400, b"bad_request", BrokerRefused),
        (302, b"", BrokerRefused),
        (503, b"", ConnectionLost),
        (200, b"<html>", BrokerRefused),
    ],
)
def test_an_answer_that_is_none_is_a_refusal_or_a_reason_to_wait(
    status: int, text: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error, match="ACESTEP_MANAGEMENT_URL"):
        _read(status, text)


def test_an_answer_is_json_or_empty() -> None:
    assert (_read(200, b"[1]"), _read(204, b"")) == ([1], None)


@pytest.mark.parametrize("url", ["rabbit:15672", "amqp://me:sesame@host", "http://"])
def test_a_malformed_address_stops_the_start_without_repeating_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match="ACESTEP_MANAGEMENT_URL: must look like http://") as refused:
        load({"ACESTEP_MANAGEMENT_URL": url}, None)
    assert "sesame" not in str(refused.value)
