# SPDX-License-Identifier: Apache-2.0
"""The limit changes while requests wait: it holds from the next start, or the start says what to do; none is lost."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from aio_pika.exceptions import DeliveryError

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.management import vhost_of
from acestep_consumer.broker.topology import CAPACITY, GENERATE, capacity_policy, topology
from tests.support.broker import Peer, broker_settings, until
from tests.support.command import run_command
from tests.support.waiting import WITHIN_S

if TYPE_CHECKING:
    from acestep_consumer.config.settings import BrokerSettings
    from infra.local.rabbitmq import RabbitMQ
    from tests.support.servers import ManagementApi


async def start(settings: BrokerSettings) -> None:
    """Start and stop what a worker has at the broker."""
    async with asyncio.timeout(WITHIN_S), BrokerConnection(settings, "worker"):
        pass


async def fill(url: str, count: int, first: int = 0) -> int:
    """Send ``count`` requests one after the other; how many the broker took."""
    taken = 0
    async with Peer(url) as producer:
        for number in range(first, first + count):
            try:
                await producer.request(str(number).encode())
            except DeliveryError:
                continue
            taken += 1
    return taken


async def drained(url: str) -> list[int]:
    """Take all that waits."""
    async with Peer(url) as worker:
        return [int((await worker.take(GENERATE)).body) for _ in range(await worker.ready(GENERATE))]


async def run_commands(rabbitmq: RabbitMQ, text: str) -> list[str]:
    """Run the commands that an error names, as they stand there."""
    commands = [line for line in text.splitlines() if line.startswith("rabbitmqctl ")]
    for command in commands:
        await asyncio.to_thread(rabbitmq.ctl, *shlex.split(command)[1:])
    return commands


async def refusal(settings: BrokerSettings) -> str:
    with pytest.raises(BrokerRefused) as refused:
        await start(settings)
    return str(refused.value)


@pytest.fixture
def managed(rabbitmq: RabbitMQ) -> dict[str, Any]:
    """The setting that names the management API, whose login is the broker's."""
    return {"management_url": rabbitmq.management_url}


@pytest.mark.broker_versions
async def test_raised_and_lowered_with_the_management_api_the_limit_is_exact_and_nothing_is_lost(
    amqp_url: str, managed: dict[str, Any]
) -> None:
    await start(broker_settings(amqp_url, queue_maxsize=5, **managed))
    assert await fill(amqp_url, 8) == 5
    await start(broker_settings(amqp_url, queue_maxsize=9, **managed))
    assert await fill(amqp_url, 8, first=100) == 4
    await start(broker_settings(amqp_url, queue_maxsize=2, **managed))
    assert await fill(amqp_url, 3, first=200) == 0
    assert await drained(amqp_url) == [0, 1, 2, 3, 4, 100, 101, 102, 103]
    assert await fill(amqp_url, 5) == 2


async def test_a_burst_at_a_limit_held_by_the_policy_meets_exactly_the_limit(
    amqp_url: str, managed: dict[str, Any]
) -> None:
    await start(broker_settings(amqp_url, queue_maxsize=20, **managed))
    async with Peer(amqp_url) as producer:
        sent = await asyncio.gather(*(producer.request(b"{}") for _ in range(200)), return_exceptions=True)
        assert sum(outcome is None for outcome in sent) == 20
        assert await producer.ready(GENERATE) == 20


@pytest.mark.broker_versions
async def test_on_a_quorum_queue_too_the_messages_stay_and_the_new_limit_refuses(
    amqp_url: str, managed: dict[str, Any]
) -> None:
    values = {"queue_type": "quorum", **managed}
    await start(broker_settings(amqp_url, queue_maxsize=20, **values))
    assert await fill(amqp_url, 10) == 10
    await start(broker_settings(amqp_url, queue_maxsize=3, **values))
    assert await fill(amqp_url, 5, first=100) == 0
    await start(broker_settings(amqp_url, queue_maxsize=30, **values))
    assert await fill(amqp_url, 5, first=200) == 5
    assert await drained(amqp_url) == [*range(10), *range(200, 205)]


async def test_a_queue_with_an_argument_is_lowered_by_the_management_api(
    amqp_url: str, managed: dict[str, Any]
) -> None:
    await start(broker_settings(amqp_url, queue_maxsize=8))
    assert await fill(amqp_url, 6) == 6
    await start(broker_settings(amqp_url, queue_maxsize=3, **managed))
    assert await fill(amqp_url, 2) == 0
    assert await drained(amqp_url) == [0, 1, 2, 3, 4, 5]
    assert await fill(amqp_url, 5) == 3


async def test_without_the_management_api_a_lower_limit_is_an_error_whose_command_sets_it(
    amqp_url: str, rabbitmq: RabbitMQ
) -> None:
    await start(broker_settings(amqp_url, queue_maxsize=8))
    assert await fill(amqp_url, 6) == 6
    lower = broker_settings(amqp_url, queue_maxsize=3)
    text = await refusal(lower)
    assert "ACESTEP_QUEUE_MAXSIZE is 3" in text
    assert "ACESTEP_MANAGEMENT_URL" in text
    assert await fill(amqp_url, 1, first=6) == 1  # the limit is still the old one
    assert len(await run_commands(rabbitmq, text)) == 1
    await start(lower)
    assert await fill(amqp_url, 2) == 0
    assert await drained(amqp_url) == [0, 1, 2, 3, 4, 5, 6]


async def test_a_policy_left_behind_is_noticed_by_a_worker_that_wants_more(
    amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ, management: ManagementApi
) -> None:
    """The queue's argument is as wanted, and yet it would hold less."""
    await start(broker_settings(amqp_url, queue_maxsize=8))
    path = f"/api/policies/{amqp_vhost}/{CAPACITY}"
    await asyncio.to_thread(management.call, "PUT", path, capacity_policy(3).as_body())
    text = await refusal(broker_settings(amqp_url, queue_maxsize=8))
    assert "hold only 3 messages" in text
    await run_commands(rabbitmq, text)
    await start(broker_settings(amqp_url, queue_maxsize=8))


async def test_a_queue_whose_policy_is_gone_is_not_unlimited_in_silence(
    amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ, management: ManagementApi, managed: dict[str, Any]
) -> None:
    await start(broker_settings(amqp_url, queue_maxsize=8, **managed))
    await start(broker_settings(amqp_url, queue_maxsize=8))  # the policy is seen without the API
    await asyncio.to_thread(management.call, "DELETE", f"/api/policies/{amqp_vhost}/{CAPACITY}")
    text = await refusal(broker_settings(amqp_url, queue_maxsize=8))
    assert "no policy limits acestep.generate to 8 messages" in text
    await run_commands(rabbitmq, text)
    await start(broker_settings(amqp_url, queue_maxsize=8))
    assert await fill(amqp_url, 10) == 8


@pytest.mark.parametrize("with_api", [True, False])
async def test_above_its_argument_the_queue_is_made_anew_by_the_commands_and_no_request_is_lost(
    amqp_url: str,
    rabbitmq: RabbitMQ,
    managed: dict[str, Any],
    with_api: bool,  # noqa: FBT001 - a case
) -> None:
    await start(broker_settings(amqp_url, queue_maxsize=4))
    assert await fill(amqp_url, 4) == 4
    higher = broker_settings(amqp_url, queue_maxsize=6, **(managed if with_api else {}))
    text = await refusal(higher)
    refuse, delete, again = [line for line in text.splitlines() if line.startswith("rabbitmqctl ")]
    await run_commands(rabbitmq, refuse)
    assert await fill(amqp_url, 1) == 0
    with pytest.raises(Exception, match="empty"):
        await run_commands(rabbitmq, delete)
    assert await drained(amqp_url) == [0, 1, 2, 3]
    await run_commands(rabbitmq, delete)
    await run_commands(rabbitmq, again)
    await start(higher)
    assert await fill(amqp_url, 10) == 6


async def test_another_policy_that_would_be_put_out_of_force_is_an_error(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, managed: dict[str, Any]
) -> None:
    theirs = {"pattern": ".*", "apply-to": "all", "definition": {"expires": 3_600_000}}
    await asyncio.to_thread(management.call, "PUT", f"/api/policies/{amqp_vhost}/theirs", theirs)
    text = await refusal(broker_settings(amqp_url, queue_maxsize=5, **managed))
    assert "'theirs'" in text
    assert '"max-length": 5' in text


async def test_an_operator_policy_that_holds_less_is_noticed(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, managed: dict[str, Any]
) -> None:
    tighter = {"pattern": ".*", "apply-to": "queues", "definition": {"max-length": 4}}
    await asyncio.to_thread(management.call, "PUT", f"/api/operator-policies/{amqp_vhost}/tight", tighter)
    assert "list_operator_policies" in await refusal(broker_settings(amqp_url, queue_maxsize=5, **managed))


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://guest:wrong@{host}", "policymaker"), ("http://{host}/elsewhere", "no management API")],
)
async def test_a_management_api_that_refuses_stops_the_start_and_says_why(
    amqp_url: str, rabbitmq: RabbitMQ, url: str, said: str
) -> None:
    host = rabbitmq.management_url.removeprefix("http://")
    text = await refusal(broker_settings(amqp_url, queue_maxsize=5, management_url=url.format(host=host)))
    assert said in text
    assert "wrong" not in text


async def test_a_management_api_that_is_away_is_waited_for(amqp_url: str) -> None:
    settings = broker_settings(amqp_url, management_url="http://127.0.0.1:1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), BrokerConnection(settings, "worker"):
            pass


async def test_a_worker_that_runs_keeps_going_while_the_limit_changes(amqp_url: str, managed: dict[str, Any]) -> None:
    """Also across a reconnect: it does not put its own, older limit back."""
    async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=5, **managed), "old") as old:
        await start(broker_settings(amqp_url, queue_maxsize=7, **managed))
        before = await old.channel()
        old.reconnect("the test says so")

        async def back() -> bool:
            return old.is_up and await old.channel() is not before

        await until(back, "the link")
    assert await fill(amqp_url, 10) == 7


async def test_imported_definitions_hold_the_limit_as_the_worker_wants_it(
    amqp_url: str, amqp_vhost: str, management: ManagementApi, managed: dict[str, Any]
) -> None:
    settings = broker_settings(amqp_url, queue_maxsize=5, **managed)
    definitions = {
        kind: [{name: value for name, value in entry.items() if name != "vhost"} for entry in entries]
        for kind, entries in topology(settings).as_definitions(amqp_vhost).items()
    }
    await asyncio.to_thread(management.call, "POST", f"/api/definitions/{amqp_vhost}", definitions)
    await start(broker_settings(amqp_url, queue_maxsize=5))
    await start(settings)
    assert await fill(amqp_url, 10) == 5


async def test_a_user_who_may_not_measure_is_told_which_permission_is_missing(
    amqp_url: str, amqp_vhost: str, management: ManagementApi
) -> None:
    name = amqp_vhost.replace("test-", "user-")
    await asyncio.to_thread(management.call, "PUT", f"/api/users/{name}", {"password": "sesame", "tags": ""})
    ours = {"configure": r"^acestep\.", "write": r"^acestep\.", "read": r"^acestep\."}
    await asyncio.to_thread(management.call, "PUT", f"/api/permissions/{amqp_vhost}/{name}", ours)
    try:
        text = await refusal(broker_settings(amqp_url.replace("guest:guest", f"{name}:sesame")))
    finally:
        await asyncio.to_thread(management.call, "DELETE", f"/api/users/{name}")
    assert "amq.default" in text
    assert "sesame" not in text


async def test_a_limit_too_large_to_be_measured_starts_soon_and_is_not_taken_for_another(
    amqp_url: str, managed: dict[str, Any]
) -> None:
    async with asyncio.timeout(WITHIN_S):
        await start(broker_settings(amqp_url, queue_maxsize=100_000))
    assert "delete_queue" in await refusal(broker_settings(amqp_url, queue_maxsize=200_000, **managed))
    assert "cannot be measured over AMQP" in await refusal(broker_settings(amqp_url, queue_maxsize=50_000))
    await start(broker_settings(amqp_url, queue_maxsize=50_000, **managed))


async def test_the_command_that_declares_prints_the_policy_and_sets_it(amqp_url: str, managed: dict[str, Any]) -> None:
    variables = {
        "ACESTEP_AMQP_URL": amqp_url,
        "ACESTEP_MANAGEMENT_URL": managed["management_url"],
        "ACESTEP_QUEUE_MAXSIZE": "3",
    }
    printed = await topology_command(variables)
    (policy,) = json.loads(printed.stdout)["policies"]
    assert policy["definition"]["max-length"] == 3
    assert (await topology_command(variables, "--declare")).returncode == 0
    assert await fill(amqp_url, 5) == 3
    refused = await topology_command(
        {**variables, "ACESTEP_MANAGEMENT_URL": "", "ACESTEP_QUEUE_MAXSIZE": "4"}, "--declare"
    )
    assert refused.returncode != 0
    command = capacity_policy(4).as_command(vhost_of(broker_settings(amqp_url)))
    assert any(line.endswith(command) for line in refused.stderr.splitlines())


async def topology_command(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(run_command, "topology", *arguments, variables=variables)
