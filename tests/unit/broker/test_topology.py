# SPDX-License-Identifier: Apache-2.0
"""The topology as data: names, kinds, limits, and the order of declaration."""

from __future__ import annotations

import json
import re

import pytest

from acestep_consumer.broker.topology import (
    DEAD_LETTER,
    GENERATE,
    PROBES,
    UNROUTED,
    Topology,
    capacity_policy,
    tier_of,
    topology,
)
from tests.support.broker import broker_settings

URL = "amqp://guest:guest@127.0.0.1:5672/"


def built(**values: object) -> Topology:
    return topology(broker_settings(URL, **values))


def queue_arguments(wanted: Topology, name: str) -> dict[str, str | int]:
    return next(queue.arguments for queue in wanted.queues if queue.name == name)


def test_requests_reach_the_work_queue_by_any_key_that_begins_with_generate() -> None:
    wanted = built()
    assert ("acestep.requests", "topic") in [(exchange.name, exchange.type) for exchange in wanted.exchanges]
    assert ("acestep.requests", "acestep.generate", "generate.#") in [
        (binding.exchange, binding.queue, binding.routing_key) for binding in wanted.bindings
    ]


def test_a_classic_work_queue_is_bounded_has_priorities_and_refuses_when_full() -> None:
    assert queue_arguments(built(queue_maxsize=7), "acestep.generate") == {
        "x-queue-type": "classic",
        "x-max-length": 7,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "acestep.dead-letter",
        "x-max-priority": 9,
    }


def test_a_quorum_work_queue_names_no_priorities_and_never_drops_what_comes_back_often() -> None:
    arguments = queue_arguments(built(queue_type="quorum", queue_maxsize=7), "acestep.generate")
    assert arguments == {
        "x-queue-type": "quorum",
        "x-max-length": 7,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "acestep.dead-letter",
        "x-dead-letter-strategy": "at-least-once",
        "x-delivery-limit": 1_000_000,
    }


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_events_that_nobody_hears_go_to_a_queue_that_keeps_the_last_ten_thousand(queue_type: str) -> None:
    wanted = built(queue_type=queue_type)
    events = next(exchange for exchange in wanted.exchanges if exchange.name == "acestep.events")
    assert events.arguments == {"alternate-exchange": "acestep.events.unrouted"}
    unrouted = queue_arguments(wanted, "acestep.events.unrouted")
    assert (unrouted["x-max-length"], unrouted["x-overflow"]) == (10_000, "drop-head")


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_the_dead_letter_queue_comes_before_the_queue_that_dead_letters_to_it(queue_type: str) -> None:
    names = [queue.name for queue in built(queue_type=queue_type).queues]
    assert names.index("acestep.dead-letter") < names.index("acestep.generate")


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_notices_are_never_dropped_nor_refused(queue_type: str) -> None:
    wanted = built(queue_type=queue_type)
    assert queue_arguments(wanted, "acestep.dead-letter.notices") == queue_arguments(wanted, "acestep.dead-letter")
    assert queue_arguments(wanted, "acestep.dead-letter").keys() <= {"x-queue-type", "x-delivery-limit"}


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_cancellations_go_to_a_stream_bounded_by_age_and_size(queue_type: str) -> None:
    wanted = built(queue_type=queue_type)
    assert queue_arguments(wanted, "acestep.control.log") == {
        "x-queue-type": "stream",
        "x-max-age": "7D",
        "x-max-length-bytes": 4_194_304,
        "x-stream-max-segment-size-bytes": 524_288,
    }
    assert {binding.routing_key for binding in wanted.bindings if binding.queue == "acestep.control.log"} == {
        "cancel.*",
        "sync.*",
    }


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_every_binding_joins_objects_that_are_declared(queue_type: str) -> None:
    wanted = built(queue_type=queue_type)
    exchanges = {exchange.name for exchange in wanted.exchanges}
    queues = {queue.name for queue in wanted.queues}
    assert exchanges == {
        "acestep.requests",
        "acestep.events",
        "acestep.events.unrouted",
        "acestep.control",
        "acestep.dead-letter",
    }
    assert queues == {
        "acestep.generate",
        "acestep.requests.identified",
        "acestep.events.unrouted",
        "acestep.dead-letter",
        "acestep.dead-letter.notices",
        "acestep.control.log",
    }
    assert all(binding.exchange in exchanges and binding.queue in queues for binding in wanted.bindings)


def test_definitions_are_json_and_name_the_virtual_host_everywhere() -> None:
    definitions = json.loads(json.dumps(built().as_definitions("music")))
    assert set(definitions) == {"exchanges", "queues", "bindings"}
    assert {entry["vhost"] for kind in definitions.values() for entry in kind} == {"music"}


def test_with_the_management_api_a_policy_holds_the_limit_and_the_queue_has_none() -> None:
    wanted = built(queue_maxsize=7, management_url="http://127.0.0.1:15672")
    assert "x-max-length" not in queue_arguments(wanted, "acestep.generate")
    (policy,) = wanted.as_definitions("music")["policies"]
    assert policy == {
        "vhost": "music",
        "name": "acestep-capacity",
        "pattern": "^acestep[.]generate($|[.])",
        "apply-to": "queues",
        "priority": 10,
        "definition": {"max-length": 7, "overflow": "reject-publish"},
    }


def test_a_tier_s_queue_is_the_request_queue_under_another_name() -> None:
    wanted = built(queue_maxsize=7).with_tiers(("tier6",))
    assert queue_arguments(wanted, "acestep.generate.tier6") == queue_arguments(wanted, "acestep.generate")
    assert "acestep.generate.tier6" not in {binding.queue for binding in wanted.bindings}
    assert (tier_of("acestep.generate.tier6"), tier_of("acestep.generate"), tier_of(f"{PROBES}1")) == (
        "tier6",
        None,
        None,
    )


def test_the_policy_covers_the_queues_of_requests_and_what_measures_it_and_nothing_else() -> None:
    pattern = capacity_policy(7).pattern
    covered = [
        name
        for name in (GENERATE, f"{PROBES}1", DEAD_LETTER, UNROUTED, f"{GENERATE}.tier6", f"{GENERATE}d")
        if re.search(pattern, name)
    ]
    assert covered == [GENERATE, f"{PROBES}1", f"{GENERATE}.tier6"]
