# SPDX-License-Identifier: Apache-2.0
"""The SDK against a real broker: what it hears, what it misses never, what it says when something is wrong."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aio_pika
import pytest

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import CONTROL, EVENTS, GENERATE
from acestep_consumer.client import (
    Client,
    ClientError,
    InvalidTaskId,
    NoQueue,
    NotEndedYet,
    QueueFull,
    RequestBody,
    Unreachable,
)
from acestep_consumer.client.connection import ClientConnection, ObjectNotFound
from acestep_schemas import examples
from acestep_schemas.events import CONTENT_TYPE, JobCompleted, JobEvent, JobProgress, Progress, WorkerEvent
from infra.local.rabbitmq import RabbitMQ
from tests.support.broker import Peer, broker_settings, failed_event, until
from tests.support.proxy import Proxy
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S, eventually

TWO = 2


class WorkerPeer(Peer):
    """A worker's voice: declares what a worker declares, and publishes events."""

    async def tell(self, *events: JobEvent | WorkerEvent, **changes: Any) -> None:
        """Publish events; ``changes`` are put into their bodies."""
        exchange = await self.channel.get_exchange(EVENTS, ensure=False)
        for event in events:
            body = json.dumps(json.loads(event.to_json()) | changes).encode()
            message = aio_pika.Message(body, content_type=CONTENT_TYPE, delivery_mode=2)
            await exchange.publish(message, event.routing_key, mandatory=False)


def progress(task_id: str, sequence: int) -> JobProgress:
    data = Progress(task_id=task_id, progress=sequence / 1000, stage="render", sequence=sequence)
    return JobProgress.of(data, attempt=1, worker_id="w")


def completed(task_id: str, **changes: Any) -> JobCompleted:
    return JobCompleted.of(examples.completed().data.model_copy(update={"task_id": task_id, **changes}))


@pytest.fixture
async def declared(amqp_url: str) -> str:
    """A virtual host with everything that a worker declares, room for two requests, and no worker."""
    async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=TWO), "test"):
        return amqp_url


@pytest.fixture
async def worker_peer(declared: str) -> AsyncIterator[WorkerPeer]:
    async with WorkerPeer(declared) as peer:
        yield peer


@pytest.fixture
async def client(declared: str) -> AsyncIterator[Client]:
    async with Client(declared) as ours:
        yield ours


@pytest.fixture
async def proxy(declared: str) -> AsyncIterator[Proxy]:
    async with Proxy.for_url(declared) as between:
        yield between


@pytest.fixture
async def proxied(declared: str, proxy: Proxy) -> AsyncIterator[Client]:
    """A client whose connection can be broken."""
    async with Client(proxy.url(declared)) as ours:
        yield ours


async def test_a_started_job_tells_its_events_in_order_and_ends(client: Client, worker_peer: WorkerPeer) -> None:
    job = await client.start({"prompt": "jazz"})
    request = await worker_peer.take(GENERATE)
    assert json.loads(request.body) == {"prompt": "jazz", "task_id": job.task_id}
    assert (request.message_id, request.delivery_mode) == (job.task_id, 2)
    told: list[JobEvent] = [progress(job.task_id, 1), completed(job.task_id)]
    async with asyncio.timeout(WITHIN_S):
        await worker_peer.tell(told[0])
        events = job.events()
        heard = [await anext(events)]
        await worker_peer.tell(told[1])
        heard += [event async for event in events]
    assert heard == told
    assert await job.wait() == told[1]
    assert job.ended == told[1]


async def test_events_of_other_jobs_stay_with_the_others(client: Client, worker_peer: WorkerPeer) -> None:
    mine, other = await client.start({"prompt": "a"}), await client.start({"prompt": "b"})
    await worker_peer.tell(failed_event(other.task_id), completed(mine.task_id))
    async with asyncio.timeout(WITHIN_S):
        assert (await mine.wait()).state == "completed"
        assert (await other.wait()).state == "failed"
        assert [event.subject async for event in mine.events()] == [mine.task_id]


async def test_two_who_wait_for_one_job_both_hear_its_end(client: Client, worker_peer: WorkerPeer) -> None:
    waits = [asyncio.create_task(client.wait("shared", WITHIN_S)) for _ in range(2)]
    job = await client.job("shared")
    await worker_peer.tell(completed("shared"))
    assert {(await wait).subject for wait in waits} == {"shared"}
    assert (await job.wait(WITHIN_S)).subject == "shared"


async def test_a_wait_that_is_over_too_soon_says_how_far_the_job_is(client: Client, worker_peer: WorkerPeer) -> None:
    job = await client.start({"prompt": "jazz"})
    with pytest.raises(NotEndedYet, match="no event yet: still queued"):
        await job.wait(0.01)
    await worker_peer.tell(progress(job.task_id, 250))
    await anext(job.events())
    with pytest.raises(TimeoutError, match="render, 25%"):
        await job.wait(0.01)


async def test_without_storage_a_wait_says_that_an_earlier_end_cannot_be_known(client: Client) -> None:
    with pytest.raises(NotEndedYet, match="whether it ended earlier is not known"):
        await client.wait("long-gone", 0.1)


@pytest.mark.parametrize("task_id", ["a b", "a.*", "#", "x" * 129])
async def test_an_id_that_no_job_can_have_is_refused_before_anything_is_sent(
    task_id: str, client: Client, worker_peer: WorkerPeer
) -> None:
    """As part of a routing key it would hear of other jobs, or wait for ever for an event under another id."""
    calls: tuple[Awaitable[object], ...] = (
        client.submit({"task_id": task_id}),
        client.start({"task_id": task_id}),
        client.job(task_id),
        client.wait(task_id),
        client.cancel(task_id),
    )
    for call in calls:
        with pytest.raises(InvalidTaskId, match="is no task id: 1 to 128 letters"):
            await call
    assert (await worker_peer.channel.declare_queue(GENERATE, passive=True)).declaration_result.message_count == 0


async def test_who_leaves_right_after_the_end_leaves_no_line_in_the_log(
    declared: str, worker_peer: WorkerPeer, caplog: pytest.LogCaptureFixture
) -> None:
    """The binding of an ended job is being taken back then; cut off in the middle, its channel would break."""
    with caplog.at_level(logging.WARNING, "acestep_consumer.client"):
        for _ in range(5):
            async with Client(declared) as client:
                job = await client.start({"prompt": "jazz"})
                await worker_peer.take(GENERATE)
                await worker_peer.tell(completed(job.task_id))
                await job.wait(WITHIN_S)
    assert caplog.messages == []


async def test_who_waits_when_the_client_is_closed_is_told(declared: str) -> None:
    async with Client(declared) as client:
        waiting = asyncio.create_task((await client.start({"prompt": "x"})).wait())
        await asyncio.sleep(0)
    with pytest.raises(ClientError, match="closed"):
        await waiting


async def test_nothing_is_missed_and_nothing_twice_over_connections_that_break(
    proxied: Client, proxy: Proxy, worker_peer: WorkerPeer
) -> None:
    count = 400
    told = [progress("j", number) for number in range(1, count + 1)]

    async def tell() -> None:
        for number, event in enumerate(told):
            await worker_peer.tell(event)
            if number % 80 == 40:
                proxy.cut()

    async with asyncio.timeout(WITHIN_S), proxied.subscribe("job.#") as events:
        telling = asyncio.create_task(tell())
        heard = [await anext(events) for _ in range(count)]
        await telling
    assert heard == told


async def test_what_is_told_while_the_connection_is_gone_is_heard_when_it_is_back(
    proxied: Client, proxy: Proxy, worker_peer: WorkerPeer
) -> None:
    job = await proxied.start({"prompt": "jazz"})
    proxy.refuse()
    await worker_peer.tell(completed(job.task_id))
    proxy.heal()
    assert (await job.wait(WITHIN_S)).subject == job.task_id


async def test_giving_up_a_wait_in_the_middle_of_an_outage_loses_nothing(
    proxied: Client, proxy: Proxy, worker_peer: WorkerPeer
) -> None:
    told = [progress("j", number) for number in range(1, 6)]
    async with asyncio.timeout(WITHIN_S), proxied.subscribe("job.#") as events:
        proxy.refuse()
        await give_up(events)
        await worker_peer.tell(*told)
        await give_up(events)
        proxy.heal()
        heard: list[JobEvent | WorkerEvent] = []
        while len(heard) < len(told):
            heard += await within(0.01, events)
    assert heard == told


async def test_a_job_can_be_followed_while_the_connection_comes_back(
    proxied: Client, proxy: Proxy, worker_peer: WorkerPeer
) -> None:
    first = await proxied.start({"prompt": "jazz"})
    proxy.cut()
    second = await proxied.start({"prompt": "rock"})
    await worker_peer.tell(completed(first.task_id), completed(second.task_id))
    async with asyncio.timeout(WITHIN_S):
        assert [(await job.wait()).subject for job in (first, second)] == [first.task_id, second.task_id]


async def test_a_subscription_whose_queue_was_deleted_is_made_again(
    client: Client, worker_peer: WorkerPeer, management: ManagementApi, amqp_vhost: str
) -> None:
    async with asyncio.timeout(WITHIN_S), client.subscribe("job.#") as events:
        (name,) = own_queues(management, amqp_vhost)
        await worker_peer.channel.queue_delete(name)
        hearing = asyncio.ensure_future(anext(events))
        await eventually(lambda: own_queues(management, amqp_vhost) == [name])
        numbers = iter(range(1, 1000))

        async def heard() -> bool:
            await worker_peer.tell(progress("j", next(numbers)))
            return hearing.done()

        await until(heard, "an event")
        assert (await hearing).subject == "j"


async def test_a_client_that_leaves_leaves_nothing_behind(
    declared: str, management: ManagementApi, amqp_vhost: str
) -> None:
    async with Client(declared) as client, client.subscribe() as _:
        await client.start({"prompt": "x"})
        assert len(own_queues(management, amqp_vhost)) == TWO
    assert own_queues(management, amqp_vhost) == []


async def test_events_of_a_newer_worker_are_heard_and_what_is_no_event_is_skipped(
    client: Client, worker_peer: WorkerPeer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "acestep_consumer.client")  # commands, which tests call, silence it
    async with asyncio.timeout(WITHIN_S), client.subscribe("job.#") as events:
        await worker_peer.tell(progress("j", 1), type="acestep.job.daydreaming.v1")
        await worker_peer.tell(progress("j", 2), mood="happy")
        heard = await anext(events)
    assert isinstance(heard, JobProgress)
    assert heard.data.sequence == TWO
    assert "skipped" in caplog.text


async def test_a_stream_is_one_line(
    client: Client, worker_peer: WorkerPeer, management: ManagementApi, amqp_vhost: str
) -> None:
    stream = client.stream("job.completed.*")
    first = asyncio.ensure_future(anext(stream))
    await eventually(lambda: own_queues(management, amqp_vhost))

    async def heard() -> bool:
        await worker_peer.tell(progress("j", 1), completed("j"))
        return first.done()

    await until(heard, "an event")
    assert isinstance(await first, JobCompleted)
    await stream.aclose()
    assert own_queues(management, amqp_vhost) == []


async def test_a_full_queue_says_when_to_try_again_and_that_no_worker_is_there(client: Client) -> None:
    await submit(client, TWO)
    with pytest.raises(QueueFull, match="no worker consumes") as full:
        await client.submit({"prompt": "one too many"})
    assert (full.value.waiting, full.value.workers) == (TWO, 0)
    assert 30 <= full.value.retry_after <= 40


async def test_the_time_to_try_again_is_learned_from_jobs_that_end(client: Client, worker_peer: WorkerPeer) -> None:
    await consume(worker_peer, workers=2)
    job = await client.start({"prompt": "x"})
    await worker_peer.tell(completed(job.task_id))
    await job.wait(WITHIN_S)
    with pytest.raises(QueueFull, match="for 2 workers") as full:
        await submit(client, 2 * TWO + 1)
    took = examples.completed().data.timings.total
    assert took is not None
    assert took / 2 <= full.value.retry_after <= 1.25 * took / 2


async def test_a_refused_request_leaves_no_one_listening(
    client: Client, management: ManagementApi, amqp_vhost: str
) -> None:
    await submit(client, TWO)
    with pytest.raises(QueueFull):
        await client.start({"prompt": "x", "task_id": "refused"})
    bindings = management.call("GET", f"/api/bindings/{amqp_vhost}")
    assert not [binding for binding in bindings if "refused" in binding["routing_key"]]


async def test_many_requests_are_sent_at_once_and_their_ids_come_in_order(
    client: Client, worker_peer: WorkerPeer
) -> None:
    bodies: list[RequestBody] = [{"prompt": "a", "task_id": "one"}, {"prompt": "b"}]
    ids = await client.submit_many(bodies, priority=4, correlation_id="c")
    assert ids[0] == "one"
    taken = [await worker_peer.take(GENERATE) for _ in range(TWO)]
    assert {message.message_id for message in taken} == set(ids)
    assert {(message.priority, message.correlation_id) for message in taken} == {(4, "c")}
    assert await client.submit_many([]) == ()


async def test_of_many_requests_those_that_found_no_room_are_named_and_can_be_sent_again(
    client: Client, worker_peer: WorkerPeer
) -> None:
    bodies: list[RequestBody] = [{"prompt": str(number)} for number in range(TWO + 3)]
    with pytest.raises(QueueFull) as full:
        await client.submit_many(bodies)
    accepted = full.value.accepted
    assert len(accepted) == len(bodies)
    assert (full.value.waiting, sum(task_id is not None for task_id in accepted)) == (TWO, TWO)
    there = [await worker_peer.take(GENERATE) for _ in range(TWO)]
    assert {message.message_id for message in there} == set(accepted) - {None}
    refused = [body for body, task_id in zip(bodies, accepted, strict=True) if task_id is None]
    assert len(await client.submit_many(refused[:TWO])) == TWO
    again = [json.loads((await worker_peer.take(GENERATE)).body)["prompt"] for _ in range(TWO)]
    assert {json.loads(message.body)["prompt"] for message in there} | set(again) <= {body["prompt"] for body in bodies}
    assert not {json.loads(message.body)["prompt"] for message in there} & set(again)


async def test_of_many_requests_with_one_wrong_id_none_is_sent(client: Client, worker_peer: WorkerPeer) -> None:
    with pytest.raises(InvalidTaskId):
        await client.submit_many([{"prompt": "a"}, {"task_id": "a b"}])
    assert await worker_peer.ready(GENERATE) == 0


async def test_a_started_request_can_name_a_reply_queue(client: Client, worker_peer: WorkerPeer) -> None:
    await client.start({"prompt": "x"}, reply_to="answers", correlation_id="c", priority=3, expiration_s=60)
    request = await worker_peer.take(GENERATE)
    assert (request.reply_to, request.correlation_id, request.priority) == ("answers", "c", 3)
    assert request.expiration == 60


async def test_a_request_carries_its_trace_and_a_client_tells_how_many_wait(
    client: Client, worker_peer: WorkerPeer
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert await client.waiting() == 0
    await client.submit({"prompt": "x"}, traceparent=trace)
    await client.submit({"prompt": "x"})
    assert await client.waiting() == TWO
    traced, plain = await worker_peer.take(GENERATE), await worker_peer.take(GENERATE)
    assert (traced.headers.get("traceparent"), plain.headers.get("traceparent")) == (trace, None)


async def test_a_misspelt_option_is_an_error_and_sends_nothing(client: Client, worker_peer: WorkerPeer) -> None:
    with pytest.raises(TypeError, match="priorty"):
        await client.submit({"prompt": "x"}, priorty=3)  # type: ignore[call-arg] # mypy sees it too
    with pytest.raises(TypeError, match="priorty"):
        await client.submit_many([{"prompt": "x"}] * 3, priorty=3)  # type: ignore[call-arg] # as above
    assert await worker_peer.ready(GENERATE) == 0


async def test_without_workers_a_client_does_not_claim_that_nothing_runs(client: Client) -> None:
    """Requests may wait where this client does not look, for workers that are still to come."""
    assert not await client.is_idle()


async def test_a_login_that_may_only_publish_can_submit_and_hears_that_the_queue_is_full(
    declared: str, rabbitmq: RabbitMQ, management: ManagementApi, amqp_vhost: str
) -> None:
    management.call("PUT", f"/api/users/{amqp_vhost}", {"password": "sesame", "tags": ""})
    only_write = {"configure": "^$", "write": "^acestep\\.requests$", "read": "^$"}
    management.call("PUT", f"/api/permissions/{amqp_vhost}/{amqp_vhost}", only_write)
    url = declared.replace("guest:guest", f"{amqp_vhost}:sesame")
    assert url != declared
    try:
        async with Client(url) as producer:
            with pytest.raises(QueueFull) as full:
                await submit(producer, TWO + 1)
            waiting = await producer.waiting()
            with pytest.raises(Unreachable, match="permission"):
                await producer.start({"prompt": "x"})
    finally:
        management.call("DELETE", f"/api/users/{amqp_vhost}")
    assert waiting in {None, TWO}
    assert full.value.waiting in {None, TWO}  # brokers differ in whether this login may ask


async def test_a_request_is_sent_again_when_its_connection_breaks(
    proxied: Client, proxy: Proxy, worker_peer: WorkerPeer
) -> None:
    await proxied.submit({"prompt": "x", "task_id": "one"})
    proxy.cut()
    await proxied.submit({"prompt": "x", "task_id": "two"})
    assert [(await worker_peer.take(GENERATE)).message_id for _ in range(TWO)] == ["one", "two"]


async def test_a_broker_that_stays_away_is_an_error_that_says_so(declared: str, proxy: Proxy) -> None:
    async with Client(proxy.url(declared), patience_s=0.5) as client:
        proxy.refuse()
        with pytest.raises(Unreachable, match=r"nothing was sent|sending the same task id again is safe"):
            await client.submit({"prompt": "x"})


async def test_a_cancel_goes_to_the_control_exchange_with_the_time_of_asking(
    client: Client, worker_peer: WorkerPeer
) -> None:
    queue = await worker_peer.channel.declare_queue(exclusive=True)
    await queue.bind(CONTROL, "cancel.*")
    await client.cancel("order-4711")
    message = await worker_peer.take(queue.name)
    assert (message.routing_key, message.body, message.delivery_mode) == ("cancel.order-4711", b"", 2)
    assert message.timestamp is not None


async def test_a_cancel_that_nobody_can_hear_is_an_error(
    client: Client, worker_peer: WorkerPeer, declared: str
) -> None:
    await worker_peer.channel.exchange_delete(CONTROL)
    with pytest.raises(NoQueue, match="topology --declare"):
        await client.cancel("order-4711")


@pytest.mark.parametrize("call", [lambda c: c.submit({"prompt": "x"}), lambda c: c.job("x"), lambda c: c.cancel("x")])
async def test_before_anything_is_declared_every_call_says_what_to_do(
    amqp_url: str, call: Callable[[Client], Awaitable[object]]
) -> None:
    async with Client(amqp_url) as client:
        with pytest.raises(NoQueue, match="topology --declare"):
            await call(client)


async def test_a_channel_that_opens_while_another_is_refused_costs_no_connection(
    declared: str, close_received: asyncio.Event
) -> None:
    async with ClientConnection(declared, patience_s=WITHIN_S) as connection:
        refused = asyncio.create_task(connection.depth("nowhere"))
        await close_received.wait()
        assert await connection.depth(GENERATE) == (0, 0)
        with pytest.raises(ObjectNotFound):
            await refused


async def test_a_wrong_password_is_an_error_that_does_not_show_it(declared: str) -> None:
    with pytest.raises(Unreachable, match="password") as error:
        async with Client(declared.replace("guest:guest", "guest:sesame")):
            pass
    assert "sesame" not in str(error.value)


async def within(seconds: float, events: AsyncIterator[JobEvent | WorkerEvent]) -> list[JobEvent | WorkerEvent]:
    """The next event, if it comes in time."""
    try:
        return [await asyncio.wait_for(anext(events), seconds)]
    except TimeoutError:
        return []


async def give_up(events: AsyncIterator[JobEvent | WorkerEvent]) -> None:
    assert await within(0.3, events) == []


def own_queues(management: ManagementApi, vhost: str) -> list[str]:
    queues = management.call("GET", f"/api/queues/{vhost}?columns=name")
    return [queue["name"] for queue in queues if queue["name"].startswith("acestep.client.")]


async def consume(worker_peer: WorkerPeer, workers: int) -> None:
    """So many consumers, each with one unacknowledged request, until the peer leaves."""
    assert worker_peer._connection is not None
    for _ in range(workers):
        channel = await worker_peer._connection.channel()
        await channel.set_qos(prefetch_count=1)
        queue = await channel.get_queue(GENERATE, ensure=False)
        await queue.consume(_hold)


async def _hold(message: object) -> None:
    """Take it and never settle it."""


async def submit(client: Client, count: int) -> None:
    for _ in range(count):
        await client.submit({"prompt": "x"})
