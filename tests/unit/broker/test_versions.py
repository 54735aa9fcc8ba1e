# SPDX-License-Identifier: Apache-2.0
"""When a start warns that the broker would take messages back from a worker that is busy with them."""

from __future__ import annotations

import pytest

from acestep_consumer.broker.versions import ack_timeout_warning

HALF_AN_HOUR, TWO_HOURS = 1_800, 7_200


@pytest.mark.parametrize(
    ("version", "queue_type", "longest_s", "broker_s"),
    [
        ("4.3.6", "classic", None, None),
        ("4.3.0-rc.1", "classic", 86_400, 60),
        ("5.0.0", "classic", None, None),
        ("3.12.0", "quorum", None, None),
        ("4.3.6", "quorum", 86_400, HALF_AN_HOUR),
        ("3.10.8", "classic", 900, None),
        ("3.10.8", "quorum", HALF_AN_HOUR, None),
        ("3.10.8", "classic", None, TWO_HOURS),
        ("4.2.1", "classic", None, 86_400),
        ("3.10.8", "classic", None, 0),
        (None, "classic", None, None),
        ("a fork", "classic", None, None),
    ],
)
def test_a_broker_that_waits_long_enough_is_not_worth_a_line(
    version: str | None, queue_type: str, longest_s: float | None, broker_s: float | None
) -> None:
    assert ack_timeout_warning(version, queue_type, longest_s, broker_s) is None


@pytest.mark.parametrize(
    ("version", "queue_type", "longest_s", "broker_s", "milliseconds"),
    [
        ("3.10.8", "classic", None, None, 7_200_000),
        ("3.10.8", "quorum", None, None, 7_200_000),
        ("3.11.28", "quorum", 3_600, None, 7_200_000),
        ("3.13.7", "classic", 1_801, None, 7_200_000),
        ("4.2.1", "classic", 10_000.25, TWO_HOURS, 20_001_000),
        ("4.0.0", "classic", None, 7_199, 7_200_000),
    ],
)
def test_a_broker_that_does_not_wait_is_named_with_the_setting_that_helps(
    version: str, queue_type: str, longest_s: float | None, broker_s: float | None, milliseconds: int
) -> None:
    text = ack_timeout_warning(version, queue_type, longest_s, broker_s)
    assert text is not None
    assert text.startswith(f"RabbitMQ {version} requeues a message after {broker_s or HALF_AN_HOUR:g} s")
    assert f"`consumer_timeout = {milliseconds}`" in text
    assert f"`rabbitmqctl eval 'application:set_env(rabbit, consumer_timeout, {milliseconds}).'`" in text


@pytest.mark.parametrize("longest_s", [None, 1_801, 3_600, 100_000.5])
def test_who_does_what_the_line_says_does_not_see_it_again(longest_s: float | None) -> None:
    text = ack_timeout_warning("3.10.8", "classic", longest_s, None)
    assert text is not None
    told = text.split("ACESTEP_AMQP_CONSUMER_TIMEOUT_S=")[1].split(",")[0]
    assert ack_timeout_warning("3.10.8", "classic", longest_s, float(told)) is None


def test_the_line_says_whether_a_limit_on_jobs_is_set_and_where_the_brokers_is_from() -> None:
    assert "no limit is set on a job" in str(ack_timeout_warning("3.10.8", "classic", None, None))
    assert "a job may run 3600 s" in str(ack_timeout_warning("3.10.8", "classic", 3_600, None))
    assert "its default" in str(ack_timeout_warning("3.10.8", "classic", None, None))
    assert "as ACESTEP_AMQP_CONSUMER_TIMEOUT_S says" in str(ack_timeout_warning("3.10.8", "classic", None, 60))
