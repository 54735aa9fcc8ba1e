# SPDX-License-Identifier: Apache-2.0
"""The users that ``infra/rabbitmq/users.py`` makes: on a real broker, each can do its part, and none of the others'."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest
from aiormq.exceptions import ChannelAccessRefused
from pydantic import SecretStr

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.dead_letter_queue import DeadLetterQueue
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.management import ManagementClient
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import (
    CONTROL,
    CONTROL_LOG,
    DEAD_LETTER,
    EVENTS,
    GENERATE,
    NOTICES,
    REQUESTS,
    UNROUTED,
    topology,
)
from acestep_consumer.client import Client
from acestep_consumer.domain.errors import Verdict
from acestep_consumer.domain.ports import Reply
from infra.rabbitmq import users
from infra.rabbitmq.users import ROLES, User
from tests.support.broker import Peer, broker_settings, failed_event
from tests.support.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from aio_pika.abc import AbstractChannel

    from acestep_consumer.broker.delivery import AmqpDelivery
    from infra.local.rabbitmq import RabbitMQ
    from tests.support.servers import ManagementApi

    Act = Callable[[AbstractChannel], Awaitable[object]]

SCRIPT = Path(__file__).parents[2] / "infra/rabbitmq/users.py"

pytestmark = pytest.mark.broker_versions


@pytest.fixture
def urls(rabbitmq: RabbitMQ, management: ManagementApi, amqp_vhost: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The AMQP URL of a user for each role, and of ``app``, which has two; made as an operator makes them."""
    suffix = uuid.uuid4().hex[:8]
    roles = {**{role: role for role in ROLES}, "app": "producer+subscriber"}
    users = [f"{name}-{suffix}={wanted}" for name, wanted in roles.items()]
    url = f"amqp://127.0.0.1:{rabbitmq.port}/{amqp_vhost}"
    management.call("POST", "/api/definitions", json.loads(made(tmp_path, "--url", url, *users)))
    yield {name: (tmp_path / f"{name}-{suffix}.url").read_text().strip() for name in roles}
    for name in roles:
        management.call("DELETE", f"/api/users/{name}-{suffix}")


@pytest.fixture
async def declared(urls: dict[str, str]) -> AsyncIterator[BrokerConnection]:
    """The worker's own link: its user declares the topology and measures the limit."""
    async with BrokerConnection(broker_settings(urls["worker"], queue_maxsize=5), "worker") as link:
        yield link


def made(secrets: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), "--secrets", str(secrets), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_exchanges_in_the_definitions_are_those_that_a_worker_declares() -> None:
    """RabbitMQ 4 refuses to import a permission on routing keys of an exchange that does not exist yet."""
    made_for_all = users.definitions([User(role, (role,)) for role in ROLES], dict.fromkeys(ROLES, "x"), "music")
    declared = topology(broker_settings("amqp://localhost/")).as_definitions("music")["exchanges"]
    assert {each["name"] for each in made_for_all["exchanges"]} == {REQUESTS, CONTROL}
    assert all(exchange in declared for exchange in made_for_all["exchanges"])


@asynccontextmanager
async def channel_of(url: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(url) as connection:
        yield await connection.channel(on_return_raises=True)


async def refused(url: str, act: Act) -> bool:
    """Whether the broker says 403 ACCESS_REFUSED. Anything else that goes wrong is an error."""
    async with channel_of(url) as channel:
        try:
            await act(channel)
        except ChannelAccessRefused:
            return True
    return False


async def allowed(url: str, attempts: dict[str, Act]) -> list[str]:
    """What of these the broker lets this user do."""
    return [what for what, act in attempts.items() if not await refused(url, act)]


def publish(exchange: str, routing_key: str) -> Act:
    async def act(channel: AbstractChannel) -> object:
        target = channel.default_exchange if not exchange else await channel.get_exchange(exchange, ensure=False)
        return await target.publish(aio_pika.Message(b"{}"), routing_key, timeout=10)

    return act


def take(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> object:
        source = await channel.get_queue(queue, ensure=False)
        return await source.get(fail=False, no_ack=True)

    return act


def consume(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> object:
        await channel.set_qos(1)
        source = await channel.get_queue(queue, ensure=False)
        return await source.consume(_leave)

    return act


async def _leave(_: object) -> None:
    """Take a delivery and do nothing with it."""


def bind_own(exchange: str, routing_key: str = "#") -> Act:
    async def act(channel: AbstractChannel) -> object:
        queue = await channel.declare_queue(exclusive=True)
        return await queue.bind(exchange, routing_key)

    return act


def make(name: str) -> Act:
    async def act(channel: AbstractChannel) -> object:
        return await channel.declare_queue(name, durable=True)

    return act


def remove(queue: str) -> Act:
    return lambda channel: channel.queue_delete(queue)


def purge(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> object:
        return await (await channel.get_queue(queue, ensure=False)).purge()

    return act


def bind_foreign(queue: str, exchange: str) -> Act:
    async def act(channel: AbstractChannel) -> object:
        return await (await channel.get_queue(queue, ensure=False)).bind(exchange, "#")

    return act


class TestTheirParts:
    async def test_a_request_goes_from_producer_to_worker_and_back_as_reply_and_event(
        self, declared: BrokerConnection, urls: dict[str, str]
    ) -> None:
        publisher = Publisher(declared, "w1")
        settings = broker_settings(urls["worker"])

        async def answer(delivery: AmqpDelivery) -> None:
            await publisher.publish(failed_event("t1"), delivery.reply)
            await delivery.settle(Verdict.DEAD_LETTER)

        consumer = Consumer(declared, settings, answer, publisher)
        await consumer.start()
        async with Client(urls["subscriber"]) as subscriber, subscriber.subscribe("job.#") as events:
            async with channel_of(urls["producer"]) as channel:
                replies = await channel.declare_queue(exclusive=True)
                await (await channel.get_exchange(REQUESTS, ensure=False)).publish(
                    aio_pika.Message(b"{}", reply_to=replies.name, message_id="t1"), "generate", timeout=10
                )
                async with asyncio.timeout(WITHIN_S), replies.iterator() as arriving:
                    assert json.loads((await anext(arriving)).body)["subject"] == "t1"
            async with asyncio.timeout(WITHIN_S):
                assert (await anext(events)).subject == "t1"
        await consumer.drain(5)
        async with DeadLetterQueue(broker_settings(urls["operator"])) as dead:
            [letter] = [letter async for letter in dead.messages()]
            await dead.requeue(letter)

    async def test_direct_replies_work_too(self, declared: BrokerConnection, urls: dict[str, str]) -> None:
        async with channel_of(urls["producer"]) as channel:
            arrived: asyncio.Queue[Any] = asyncio.Queue()
            direct = await channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
            await direct.consume(arrived.put, no_ack=True)
            await (await channel.get_exchange(REQUESTS, ensure=False)).publish(
                aio_pika.Message(b"{}", reply_to="amq.rabbitmq.reply-to"), "generate", timeout=10
            )
            async with channel_of(urls["worker"]) as worker:
                request = await (await worker.get_queue(GENERATE, ensure=False)).get()
                assert request.reply_to
                await Publisher(declared, "w1").publish(
                    failed_event("t1"), Reply(reply_to=request.reply_to, correlation_id=None)
                )
                await request.ack()
            async with asyncio.timeout(WITHIN_S):
                assert json.loads((await arrived.get()).body)["subject"] == "t1"

    async def test_a_program_with_two_roles_submits_listens_and_cancels(
        self, declared: BrokerConnection, urls: dict[str, str]
    ) -> None:
        async with Client(urls["app"]) as client, client.subscribe("job.#") as events:
            assert await client.submit({"task_id": "t2", "prompt": "jazz"}) == "t2"
            await client.cancel("t2")
            await Publisher(declared, "w1").publish(failed_event("t2"), Reply())
            async with asyncio.timeout(WITHIN_S):
                assert (await anext(events)).subject == "t2"

    async def test_a_worker_hears_cancellations_and_notices(
        self, declared: BrokerConnection, urls: dict[str, str]
    ) -> None:
        assert not await refused(urls["producer"], publish(CONTROL, "cancel.t3"))
        assert not await refused(urls["worker"], publish(CONTROL, "sync.mark"))
        assert not await refused(urls["worker"], consume(NOTICES))
        async with channel_of(urls["worker"]) as channel:
            await channel.set_qos(1)
            heard: asyncio.Queue[Any] = asyncio.Queue()
            log = await channel.get_queue(CONTROL_LOG, ensure=False)
            await log.consume(heard.put, arguments={"x-stream-offset": "first"})
            async with asyncio.timeout(WITHIN_S):
                assert (await heard.get()).routing_key == "cancel.t3"

    async def test_the_operator_alone_sets_the_limit(
        self, declared: BrokerConnection, urls: dict[str, str], rabbitmq: RabbitMQ
    ) -> None:
        async def set_limit(role: str) -> None:
            settings = broker_settings(urls[role], management_url=SecretStr(rabbitmq.management_url))
            async with ManagementClient(settings) as management:
                await management.set_limit(4)

        await set_limit("operator")
        for role in ("producer", "subscriber", "worker"):
            with pytest.raises(BrokerRefused, match=r"login|policymaker"):
                await set_limit(role)
        assert not await refused(urls["operator"], publish(REQUESTS, "generate"))


class TestTheRest:
    async def test_a_producer_cannot_do_the_others_parts(
        self, declared: BrokerConnection, urls: dict[str, str]
    ) -> None:
        attempts = {
            "take requests": take(GENERATE),
            "consume requests": consume(GENERATE),
            "remove requests": purge(GENERATE),
            "reach the queue past its exchange": publish("", GENERATE),
            "publish events": publish(EVENTS, "job.completed.t1"),
            "hear events": bind_own(EVENTS),
            "hear other producers' requests": bind_own(REQUESTS),
            "hear cancellations": bind_own(CONTROL),
            "read cancellations": consume(CONTROL_LOG),
            "speak as a worker on the control exchange": publish(CONTROL, "sync.t1"),
            "cancel by what is no task id": publish(CONTROL, "cancel.t1.t2"),
            "publish with other keys": publish(REQUESTS, "other"),
            "read dead letters": take(DEAD_LETTER),
            "write dead letters": publish(DEAD_LETTER, ""),
            "delete the queue": remove(GENERATE),
            "declare queues in the system's name": make("acestep.mine"),
            "declare queues anywhere": make("mine"),
        }
        assert await allowed(urls["producer"], attempts) == []

    async def test_a_subscriber_cannot_do_the_others_parts(
        self, declared: BrokerConnection, urls: dict[str, str]
    ) -> None:
        attempts = {
            "publish events": publish(EVENTS, "job.completed.t1"),
            "publish requests": publish(REQUESTS, "generate"),
            "publish to any queue": publish("", GENERATE),
            "cancel": publish(CONTROL, "cancel.t1"),
            "take requests": take(GENERATE),
            "hear requests": bind_own(REQUESTS),
            "read what nobody heard": take(UNROUTED),
            "read dead letters": take(DEAD_LETTER),
            "bind a queue of the system": bind_foreign(GENERATE, EVENTS),
            "delete the queue": remove(GENERATE),
            "declare queues in the system's name": make("acestep.mine"),
        }
        assert await allowed(urls["subscriber"], attempts) == []

    async def test_a_worker_cannot_do_the_others_parts(self, declared: BrokerConnection, urls: dict[str, str]) -> None:
        attempts = {
            "publish requests": publish(REQUESTS, "generate"),
            "cancel": publish(CONTROL, "cancel.t1"),
            "declare queues of others": make("mine"),
            "make queues that the broker names": bind_own(EVENTS),
        }
        assert await allowed(urls["worker"], attempts) == []

    @pytest.mark.parametrize("role", ["producer", "subscriber"])
    async def test_no_user_is_let_into_another_virtual_host(self, urls: dict[str, str], role: str) -> None:
        with pytest.raises(aio_pika.exceptions.AMQPError):
            await Peer(urls[role].rpartition("/")[0] + "/%2F").__aenter__()


class TestTheScript:
    def test_passwords_are_made_once_kept_for_their_owner_alone_and_not_printed(self, tmp_path: Path) -> None:
        folder = tmp_path / "secrets"
        printed = made(folder, "--url", "amqps://broker.example:5671/music")
        kept = {path.name: path.read_text().strip() for path in folder.iterdir()}
        assert set(kept) == {f"{role}.{kind}" for role in ROLES for kind in ("password", "url")}
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        assert not any(secret in printed for secret in kept.values())
        made(folder, "--url", "amqps://broker.example:5671/music")
        assert kept == {path.name: path.read_text().strip() for path in folder.iterdir()}
        assert kept["worker.url"] == f"amqps://worker:{kept['worker.password']}@broker.example:5671/music"

    def test_a_password_that_was_given_is_used_and_quoted_in_the_url(self, tmp_path: Path) -> None:
        (tmp_path / "app.password").write_text("p@ss/wörd\n", encoding="utf-8")
        made(tmp_path, "--url", "amqp://127.0.0.1/", "app=producer")
        assert (tmp_path / "app.url").read_text() == "amqp://app:p%40ss%2Fw%C3%B6rd@127.0.0.1/\n"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("app=singer",), "'app=singer' must be NAME=ROLE or NAME=ROLE+ROLE, with roles of producer, subscriber"),
            (("../app=producer",), "must be NAME=ROLE"),
            (("--url", "amqp://user:sesame@host/"), "must look like amqps://broker.example:5671/vhost, without a user"),
            (("--url", "http://host/"), "must look like amqps://"),
        ],
    )
    def test_what_it_cannot_read_is_answered_with_the_form(
        self, tmp_path: Path, arguments: tuple[str, ...], said: str
    ) -> None:
        done = subprocess.run(
            [sys.executable, "-I", str(SCRIPT), "--secrets", str(tmp_path / "s"), *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr

    def test_roles_of_one_user_add_up_and_what_one_leaves_open_stays_open(self) -> None:
        both = User.parse("app=operator+producer")
        assert both.topic_permissions("/") == []
        assert "acestep" in both.permission("/")["read"]
        assert User.parse("worker").roles == ("worker",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")
def test_the_files_can_be_given_to_the_user_of_the_container(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    command = [sys.executable, users.__file__, "--secrets", str(secrets), "--owner", "10001"]
    subprocess.run([*command, "worker"], capture_output=True, check=True)
    owners = {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in secrets.iterdir()}
    assert owners == {(10001, 0o600)}
