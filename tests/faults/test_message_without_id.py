# SPDX-License-Identifier: Apache-2.0
"""Messages without task_id and message_id: each has one identity at every delivery, and one end."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from acestep_consumer.client import Client, QueueFull
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.nameless import Nameless
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


@pytest.fixture
def nameless(management: ManagementApi, amqp_vhost: str) -> Nameless:
    return Nameless(management, amqp_vhost)


@pytest.fixture(params=["classic", "quorum"])
def settings(request: pytest.FixtureRequest, service_environment: dict[str, str]) -> dict[str, str]:
    return service_environment | {"ACESTEP_QUEUE_TYPE": request.param, "ACESTEP_QUEUE_WORKERS": "2"}


def started(seen: EventRecorder) -> Counter[str]:
    """How often each task began."""
    return Counter(heard.task_id for heard in seen.events if heard.state == "started")


async def test_a_message_keeps_its_identity_however_often_its_worker_dies(
    settings: dict[str, str], tmp_path: Path, nameless: Nameless
) -> None:
    settings |= {"ACESTEP_MAX_ATTEMPTS": "3"}
    never = tmp_path / "never"
    url = settings["ACESTEP_AMQP_URL"]
    async with running(WorkerProcess(tmp_path, settings, light=True)):
        pass  # it has declared the queues
    async with EventRecorder(url) as seen:
        await nameless.request(f"until={never}", correlation_id="c-1")
        for count in range(1, 4):
            async with running(WorkerProcess(tmp_path, settings, light=True)) as worker:
                await eventually(lambda count=count: sum(started(seen).values()) == count, WITHIN_S)  # type: ignore[misc]
                await asyncio.to_thread(worker.kill)
        async with running(WorkerProcess(tmp_path, settings, light=True)):
            await eventually(lambda: [heard for heard in seen.events if heard.terminal], WITHIN_S)
        assert len(started(seen)) == 1
        ends = [heard for heard in seen.events if heard.terminal]
        assert {(heard.task_id, heard.state) for heard in ends} == {(next(iter(started(seen))), "failed")}
        assert ends[0].data["error"]["code"] == "engine_crashed"


async def test_two_messages_with_equal_bodies_are_two_jobs_and_each_ends_once(
    settings: dict[str, str], tmp_path: Path, nameless: Nameless
) -> None:
    url = settings["ACESTEP_AMQP_URL"]
    async with running(WorkerProcess(tmp_path, settings, light=True)), EventRecorder(url) as seen, Peer(url) as peer:
        for _ in range(5):
            await nameless.request("x")
        await eventually(lambda: len([heard for heard in seen.events if heard.terminal]) == 5, WITHIN_S)

        async def empty() -> bool:
            return await peer.ready(GENERATE) == 0

        await until(empty, "nothing waits")
        ends = Counter(heard.task_id for heard in seen.events if heard.terminal)
        assert (len(ends), set(ends.values())) == (5, {1})
        assert {heard.state for heard in seen.events if heard.terminal} == {"completed"}


@pytest.mark.broker_versions
async def test_a_message_that_expires_in_the_queue_gets_an_id_an_event_and_an_answer(
    settings: dict[str, str], tmp_path: Path, nameless: Nameless
) -> None:
    settings |= {"ACESTEP_QUEUE_WORKERS": "1"}
    url, go = settings["ACESTEP_AMQP_URL"], tmp_path / "go"
    async with running(WorkerProcess(tmp_path, settings, light=True)), EventRecorder(url) as seen, Peer(url) as peer:
        answers = await peer.channel.declare_queue(exclusive=True)
        await peer.submit(task_id="first", prompt=f"until={go}")
        await eventually(lambda: "started" in seen.states("first"), WITHIN_S)
        await nameless.request("x", expiration="200", reply_to=answers.name, correlation_id="c-7")
        await eventually(lambda: [heard for heard in seen.events if heard.state == "expired"], WITHIN_S)
        answer = await peer.take(answers.name)
        assert answer.correlation_id == "c-7"
        assert json.loads(answer.body)["data"]["status"] == "expired"
        go.touch()
        await eventually(lambda: seen.terminal("first"), WITHIN_S)


async def test_a_body_that_cannot_be_read_and_has_no_id_is_rejected_with_an_event(
    settings: dict[str, str], tmp_path: Path, nameless: Nameless
) -> None:
    url = settings["ACESTEP_AMQP_URL"]
    async with running(WorkerProcess(tmp_path, settings, light=True)), EventRecorder(url) as seen, Peer(url) as peer:
        await nameless.publish(b"\xff\xfe no JSON")
        await eventually(lambda: [heard for heard in seen.events if heard.terminal], WITHIN_S)
        assert [heard.state for heard in seen.events] == ["rejected"]
        assert (await peer.take(DEAD_LETTER)).body == b"\xff\xfe no JSON"


@pytest.mark.broker_versions
async def test_a_full_queue_loses_no_message_without_an_id_and_its_limit_holds(
    settings: dict[str, str], tmp_path: Path, nameless: Nameless, management: ManagementApi, amqp_vhost: str
) -> None:
    settings |= {"ACESTEP_QUEUE_MAXSIZE": "5", "ACESTEP_QUEUE_WORKERS": "1"}
    url, go = settings["ACESTEP_AMQP_URL"], tmp_path / "go"
    async with running(WorkerProcess(tmp_path, settings, light=True)), EventRecorder(url) as seen, Peer(url) as peer:
        await peer.submit(task_id="first", prompt=f"until={go}")
        await eventually(lambda: "started" in seen.states("first"), WITHIN_S)
        for _ in range(5):
            await nameless.request("x")
        go.touch()
        await eventually(lambda: len([heard for heard in seen.events if heard.terminal]) == 6, WITHIN_S)
        ends = Counter(heard.task_id for heard in seen.events if heard.terminal)
        assert (len(ends), set(ends.values())) == (6, {1})


async def test_a_message_with_an_id_does_not_wait_behind_the_queue(
    settings: dict[str, str], tmp_path: Path, nameless: Nameless
) -> None:
    """The one without an id came first; it is done first."""
    settings |= {"ACESTEP_QUEUE_WORKERS": "1"}
    url, go = settings["ACESTEP_AMQP_URL"], tmp_path / "go"
    async with running(WorkerProcess(tmp_path, settings, light=True)), EventRecorder(url) as seen, Peer(url) as peer:
        await peer.submit(task_id="first", prompt=f"until={go}")
        await eventually(lambda: "started" in seen.states("first"), WITHIN_S)
        await nameless.request("x")
        for number in range(8):
            await peer.submit(task_id=f"later-{number}")
        go.touch()
        await eventually(lambda: len([heard for heard in seen.events if heard.terminal]) == 10, WITHIN_S)
        order = [heard.task_id for heard in seen.events if heard.state == "started"]
        place = next(index for index, task in enumerate(order) if task != "first" and not task.startswith("later"))
        assert place <= 2


async def test_a_producer_at_a_full_queue_learns_of_the_worker_that_is_busy_with_one(
    service_environment: dict[str, str], tmp_path: Path, nameless: Nameless
) -> None:
    """With a prefetch of 1 that worker has no consumer on the request queue, and yet nobody need start one."""
    settings = service_environment | {"ACESTEP_QUEUE_WORKERS": "1", "ACESTEP_QUEUE_MAXSIZE": "2"}
    url, go = settings["ACESTEP_AMQP_URL"], tmp_path / "go"
    worker = WorkerProcess(tmp_path, settings, light=True)
    async with running(worker), EventRecorder(url) as seen, Client(url) as client:
        await nameless.request(f"until={go}")
        await eventually(lambda: started(seen), WITHIN_S)
        async with Peer(url) as peer:
            await until(lambda: no_consumer(peer), "its consumer is gone", WITHIN_S)
        assert (await client.outlook(WITHIN_S)).workers == 1
        await client.submit_many([{"prompt": "one"}, {"prompt": "two"}])
        with pytest.raises(QueueFull, match="2 wait for 1 worker") as caught:
            await client.submit({"prompt": "three"})
        assert caught.value.workers == 1
        go.touch()


async def no_consumer(peer: Peer) -> bool:
    declared = await peer.channel.declare_queue(GENERATE, passive=True)
    return declared.declaration_result.consumer_count == 0
