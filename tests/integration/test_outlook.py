# SPDX-License-Identifier: Apache-2.0
"""What a submitted request is told to expect: against a worker that works, and where nobody can say."""

import asyncio
import json
import os
import pty
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage
from yarl import URL

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import CONTROL, EVENTS, GENERATE
from acestep_consumer.client import Client, sync
from acestep_schemas.events import Worker, WorkerEvent
from infra.local import rabbitmq4
from tests.support.broker import API_POLL_S, Peer, broker_settings, until
from tests.support.proxy import Proxy
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, WorkerProcess, clean_environment, running

SONG = {"audio_format": "wav", "audio_duration": 10}
# Nobody who would answer on a busy machine is given up.
PATIENT_S = 30.0
# Two machines' worth of load may lie on this one; what is off by more is wrong.
FACTOR = 3.0


@pytest.fixture
async def declared(amqp_url: str) -> str:
    """A virtual host with everything that a worker declares, and no worker."""
    async with BrokerConnection(broker_settings(amqp_url), "test"):
        return amqp_url


@pytest.fixture
async def client(declared: str) -> AsyncIterator[Client]:
    async with Client(declared) as ours:
        yield ours


@asynccontextmanager
async def worker_that_says(url: str, *answers: Worker, prefetch: int = 1) -> AsyncIterator[None]:
    """Consumes, keeps what it gets, and answers status requests with these."""

    async def keep(_: AbstractIncomingMessage) -> None:
        """Neither ack nor give back."""

    async with Peer(url) as peer:
        events = await peer.channel.get_exchange(EVENTS, ensure=False)

        async def answer(_: AbstractIncomingMessage) -> None:
            for data in answers:
                event = WorkerEvent.of(data)
                await events.publish(aio_pika.Message(event.to_json()), event.routing_key)

        called = await peer.channel.declare_queue(exclusive=True)
        await called.bind(CONTROL, "status")
        await called.consume(answer, no_ack=True)
        await peer.channel.set_qos(prefetch)
        await (await peer.channel.get_queue(GENERATE, ensure=False)).consume(keep)
        yield


def said(worker_id: str = "w1", **fields: Any) -> Worker:
    known = {"state": "ready", "prefetch": 1, "in_hand": 1, "seconds_per_job": 60.0}
    return Worker(worker_id=worker_id, models=("m",), tier="tier6", vram_gb=24, **{**known, **fields})


async def run_submit(variables: dict[str, str], *arguments: str) -> tuple[int | None, str, str]:
    """Run ``submit`` beside this event loop; its exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "submit", "--prompt", "x", *arguments,
        env=clean_environment(variables), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    return process.returncode, out.decode(), err.decode()


async def test_the_expected_time_is_about_the_time_that_it_takes(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """Two jobs at a time, each of a second, and eight before the one that is asked about."""
    settings = {**service_environment, "ACESTEP_QUEUE_WORKERS": "2"}
    request = {**SONG, "prompt": "takes=1"}
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)),
        Client(settings["ACESTEP_AMQP_URL"]) as client,
        asyncio.timeout(WITHIN_S),
    ):

        async def answers() -> bool:
            return (await client.outlook(PATIENT_S)).workers == 1

        await until(answers, "the worker, which is ready a moment before it consumes, answers", WITHIN_S)
        assert "no worker has finished a job yet" in ((await client.outlook(PATIENT_S)).note or "")
        for job in [await client.start(request) for _ in range(4)]:
            assert (await job.wait()).state == "completed"
        for _ in range(8):
            await client.submit(request)
        last = await client.start(request)
        began = time.monotonic()
        outlook = await client.outlook(PATIENT_S)
        await last.wait()
        took_s = time.monotonic() - began
    assert (outlook.workers, outlook.note) == (1, None)
    # Of nine two are running, or the second is on its way, also between the answers of queue and worker; some may have
    # ended while the last were submitted.
    assert outlook.in_hand in {1, 2}
    assert outlook.position in range(1, 9)
    assert outlook.expected_s is not None
    assert took_s / FACTOR < outlook.expected_s < took_s * FACTOR


async def test_the_command_prints_place_and_time_as_json(declared: str) -> None:
    variables = {"ACESTEP_AMQP_URL": declared}
    async with (
        worker_that_says(declared, said("a"), said("b", in_hand=0), prefetch=50),
        worker_that_says(declared),
        asyncio.timeout(WITHIN_S),
    ):
        answer: dict[str, Any] = {"workers": 0}
        while answer["workers"] < 2:  # it waits two seconds and no longer, which a busy machine may need
            code, out, err = await run_submit(variables, "--json", "--task-id", "mine")
            assert (code, err) == (0, "")
            (line,) = out.splitlines()
            answer = json.loads(line)
    assert answer == {
        "task_id": "mine", "position": 0, "in_hand": 1, "workers": 2, "expected_s": 60.0, "note": None
    }  # fmt: skip


async def test_on_a_terminal_the_id_alone_is_output_and_the_rest_is_said_beside_it(declared: str) -> None:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "submit", "--prompt", "x", "--task-id", "mine",
        env=clean_environment({"ACESTEP_AMQP_URL": declared, "COLUMNS": "200", "TERM": "xterm", "NO_COLOR": "1"}),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), WITHIN_S)
    shown = await asyncio.to_thread(os.read, ours, 10_000)
    os.close(ours)
    os.close(theirs)
    assert (process.returncode, out) == (0, b"mine\n")
    assert "position 1 in the queue; no worker takes requests now" in shown.decode()


async def test_without_a_terminal_nobody_is_asked_and_nothing_is_said(declared: str) -> None:
    assert await run_submit({"ACESTEP_AMQP_URL": declared}, "--task-id", "mine") == (0, "mine\n", "")


async def test_each_waiting_request_has_the_next_place(client: Client) -> None:
    positions = []
    for _ in range(3):
        await client.submit({"prompt": "x"})
        positions.append((await client.outlook(PATIENT_S)).position)
    assert positions == [1, 2, 3]


async def test_a_worker_that_does_not_answer_is_not_waited_for_long(declared: str, client: Client) -> None:
    async with worker_that_says(declared):
        began = time.monotonic()
        await client.submit({"prompt": "x"})
        outlook = await client.outlook(3)
    assert (outlook.position, outlook.workers, outlook.expected_s) == (0, 0, None)
    assert outlook.note == "no worker answered in time"
    assert time.monotonic() - began < 10


async def test_answers_that_came_are_used_when_another_does_not_come(declared: str, client: Client) -> None:
    async with worker_that_says(declared, said()), worker_that_says(declared):
        for _ in range(3):
            await client.submit({"prompt": "x"})
        outlook = await client.outlook(PATIENT_S)
    assert (outlook.position, outlook.workers, outlook.expected_s) == (1, 1, 90)
    assert "1 answered for 2 consumers" in (outlook.note or "")


async def test_before_anybody_declared_the_queue_it_is_a_note(amqp_url: str) -> None:
    async with Client(amqp_url) as client:
        outlook = await client.outlook(PATIENT_S)
    assert (outlook.position, outlook.expected_s) == (None, None)
    assert "the queue could not be asked" in (outlook.note or "")


async def test_a_broker_that_went_away_is_a_note_within_the_time(declared: str) -> None:
    async with Proxy.for_url(declared) as proxy, Client(proxy.url(declared)) as client:
        proxy.refuse()
        outlook = await client.outlook(1)
        proxy.heal()
        await client.submit({"prompt": "x"})
        again = await client.outlook(PATIENT_S)
    assert (outlook.position, outlook.expected_s) == (None, None)
    assert "the queue could not be asked" in (outlook.note or "")
    assert again.position == 1


async def test_a_broker_that_does_not_answer_is_a_note_within_the_time(declared: str) -> None:
    async with Proxy.for_url(declared) as proxy, Client(proxy.url(declared)) as client:
        await client.submit({"prompt": "x"})
        proxy.stall()
        began = time.monotonic()
        outlook = await client.outlook(0.5)
        took_s = time.monotonic() - began
        proxy.heal()
    assert "the queue could not be asked" in (outlook.note or "")
    assert took_s < 10


@pytest.mark.broker_versions
@pytest.mark.parametrize(
    ("rights", "topic"),
    [
        ({"configure": "^$", "write": r"^acestep\.requests$", "read": "^$"}, None),
        ({"configure": ".*", "write": r"^acestep\.(requests|client\..*)$", "read": ".*"}, None),
        ({"configure": ".*", "write": ".*", "read": ".*"}, r"^cancel\..*$"),
    ],
    ids=["may only publish", "may hear", "may hear, and cancel"],
)
async def test_a_login_that_may_not_ask_the_workers_gets_its_place_and_goes_on_submitting(
    declared: str, amqp_vhost: str, management: ManagementApi, rights: dict[str, str], topic: str | None
) -> None:
    name = f"producer-{amqp_vhost}"
    management.call("PUT", f"/api/users/{name}", {"password": "secret", "tags": ""})
    management.call("PUT", f"/api/permissions/{amqp_vhost}/{name}", rights)
    if topic:
        topics = {"exchange": CONTROL, "write": topic, "read": ".*"}
        management.call("PUT", f"/api/topic-permissions/{amqp_vhost}/{name}", topics)
    url = str(URL(declared).with_user(name).with_password("secret"))
    try:
        async with worker_that_says(declared, said(), prefetch=1), Client(url) as client:
            submitting = [asyncio.create_task(client.submit({"prompt": "x"})) for _ in range(10)]
            await asyncio.gather(*[client.outlook(PATIENT_S) for _ in range(3)], *submitting)
            outlook = await client.outlook(PATIENT_S)
    finally:
        management.call("DELETE", f"/api/users/{name}")
    # From RabbitMQ 4 on, it takes a permission on a queue to see how many messages wait there.
    blind = rabbitmq4.wanted() and rights["read"] == "^$"
    assert (outlook.position, outlook.expected_s) == (None if blind else 9, None)
    asked = "queue" if blind else "workers"
    assert f"the {asked} could not be asked: this login may not" in (outlook.note or "")


async def test_no_queue_is_left_behind(
    declared: str, client: Client, amqp_vhost: str, management: ManagementApi
) -> None:
    before = {queue["name"] for queue in management.call("GET", f"/api/queues/{amqp_vhost}")}
    async with worker_that_says(declared, said()):
        assert (await client.outlook(PATIENT_S)).workers == 1

    async def gone() -> bool:
        return {queue["name"] for queue in management.call("GET", f"/api/queues/{amqp_vhost}")} == before

    await until(gone, "only the queues that were there", every_s=API_POLL_S)


async def test_the_client_without_async_says_the_same(declared: str) -> None:
    async with worker_that_says(declared, said(in_hand=0)):

        def ask() -> sync.Outlook:
            with sync.SyncClient(declared) as client:
                client.submit({"prompt": "x"})
                return client.outlook(PATIENT_S)

        outlook = await asyncio.to_thread(ask)
    assert (outlook.position, outlook.workers, outlook.expected_s) == (0, 1, 60)
