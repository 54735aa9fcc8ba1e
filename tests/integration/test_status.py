# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer status`` beside a real broker, with a stand-in for a worker."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from yarl import URL

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import ConnectionLost
from acestep_consumer.broker.inspection import BrokerInspection, QueueDepth
from acestep_consumer.broker.management import ManagementClient
from acestep_consumer.broker.topology import DEAD_LETTER, EVENTS, GENERATE, REQUESTS, tier_queue, topology
from acestep_consumer.client import Client
from acestep_schemas.events import JobCompleted, Worker, WorkerEvent
from infra.local.rabbitmq import RabbitMQ
from tests.support.broker import API_POLL_S, broker_settings, until
from tests.support.command import run_command
from tests.support.jobs import make_job, make_manifest
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, WorkerProcess, clean_environment, running


def environment_of(url: str, **variables: str) -> dict[str, str]:
    return clean_environment({"ACESTEP_AMQP_URL": url, "COLUMNS": "160", **variables})


async def run_status(url: str, *arguments: str, **variables: str) -> tuple[int | None, str, str]:
    """Run the command beside this event loop, which is the worker."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        "status",
        *arguments,
        env=environment_of(url, **variables),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    return process.returncode, out.decode(), err.decode()


async def answer(url: str, *arguments: str, **variables: str) -> dict[str, Any]:
    code, out, err = await run_status(url, "--json", *arguments, **variables)
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


@asynccontextmanager
async def consuming(url: str, worker_id: str, *prefetch: int) -> AsyncIterator[AbstractChannel]:
    """A worker's connection with a consumer for each number, as a worker has after its prefetch changed."""
    name = f"acestep-consumer {worker_id} consume"
    connection = await aio_pika.connect(url, client_properties={"connection_name": name})
    async with connection:
        channel = await connection.channel()
        queue = await channel.get_queue(GENERATE, ensure=False)
        for number in prefetch:
            await channel.set_qos(number)
            await queue.consume(keep)
        yield channel


async def keep(message: AbstractIncomingMessage) -> None:
    """Neither ack nor give back: it is in this worker's hands."""


async def declare(url: str) -> None:
    async with BrokerConnection(broker_settings(url), "test"):
        pass


async def publish(channel: AbstractChannel, exchange: str, key: str, body: bytes = b"{}") -> None:
    target = await channel.get_exchange(exchange, ensure=False)
    await target.publish(aio_pika.Message(body), key, timeout=10)


@asynccontextmanager
async def announcing(channel: AbstractChannel, *events: WorkerEvent | JobCompleted) -> AsyncIterator[None]:
    """Publish these events again and again, each time as others: whoever listens hears some of them."""

    async def announce() -> None:
        while True:
            for event in events:
                key = event.routing_key
                fresh = event.model_copy(update={"id": f"{event.id}-{asyncio.get_running_loop().time()}"})
                await publish(channel, EVENTS, key, fresh.to_json())
            await asyncio.sleep(0.1)

    task = asyncio.create_task(announce())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def announcement(worker_id: str, prefetch: int, in_hand: int = 0) -> WorkerEvent:
    data = Worker(
        worker_id=worker_id,
        state="ready",
        prefetch=prefetch,
        in_hand=in_hand,
        models=("m",),
        tier="tier6",
        vram_gb=24,
    )
    return WorkerEvent.of(data)


def completion(total_s: float) -> JobCompleted:
    manifest = make_manifest(make_job())
    timings = manifest.timings.model_copy(update={"total": total_s})
    return JobCompleted.of(manifest.model_copy(update={"timings": timings}))


async def test_the_management_api_tells_running_jobs_prefetch_and_bound(
    amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ, management: ManagementApi
) -> None:
    await declare(amqp_url)
    async with consuming(amqp_url, "gpu-0", 2, 1) as channel, consuming(amqp_url, "gpu-1", 4):
        for _ in range(9):
            await publish(channel, REQUESTS, "generate")

        async def counted() -> bool:
            queue = management.call("GET", f"/api/queues/{amqp_vhost}/{GENERATE}")
            connections = management.call("GET", f"/api/vhosts/{amqp_vhost}/connections")
            named = [each for each in connections if each.get("client_properties", {}).get("connection_name")]
            messages = (queue.get("messages_ready"), queue.get("messages_unacknowledged"))
            return messages == (2, 7) and len(queue["consumer_details"]) == 3 and len(named) == 2

        await until(counted, "the API's statistics are up to date", every_s=API_POLL_S)
        found = await answer(amqp_url, "--sample", "0", ACESTEP_MANAGEMENT_URL=rabbitmq.management_url)
    queue = found["queue"]
    assert (queue["ready"], queue["unacked"], queue["consumers"]) == (2, 7, 3)
    assert (queue["limit"], queue["limit_from"], queue["bound"]) == (200, "broker", 207)
    assert {(each["worker_id"], each["prefetch"]) for each in found["workers"]} == {("gpu-0", 3), ("gpu-1", 4)}
    assert found["notes"] == []


async def test_without_the_api_events_tell_of_workers_and_of_the_time_that_is_left(amqp_url: str) -> None:
    await declare(amqp_url)
    async with consuming(amqp_url, "w1", 2) as channel:
        for _ in range(6):
            await publish(channel, REQUESTS, "generate")
        async with announcing(channel, announcement("w1", 2, in_hand=2), completion(30)):
            found = await answer(amqp_url, "--sample", "1")
    assert found["queue"]["ready"] == 4
    assert (found["queue"]["unacked"], found["queue"]["unacked_from"]) == (2, "workers")
    assert found["queue"]["bound"] == 202
    (worker,) = found["workers"]
    assert (worker["worker_id"], worker["prefetch"], worker["tier"]) == ("w1", 2, "tier6")
    assert found["pace"]["source"] == "events"
    assert found["pace"]["jobs_a_minute"] > 0
    # Two in each slot, one after the other, when the running ones (a quarter and three quarters done) have ended.
    assert found["eta_s"] == round(0.75 * 30 + 2 * 30 + 0.5)
    assert any("ACESTEP_MANAGEMENT_URL" in note for note in found["notes"])


async def test_a_worker_that_has_nothing_to_tell_answers_when_it_is_asked(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    settings = {**service_environment, "ACESTEP_QUEUE_WORKERS": "3", "ACESTEP_WORKER_ID": "quiet"}
    async with running(WorkerProcess(tmp_path, settings, light=True)):
        found = await answer(service_environment["ACESTEP_AMQP_URL"], "--sample", "3")
    (worker,) = found["workers"]
    assert (worker["worker_id"], worker["prefetch"], worker["state"]) == ("quiet", 3, "ready")
    assert found["queue"]["bound"] == 203


async def test_how_many_jobs_a_worker_runs_is_asked_again_and_again(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    settings = {**service_environment, "ACESTEP_QUEUE_WORKERS": "2"}
    url, end = settings["ACESTEP_AMQP_URL"], tmp_path / "end"
    async with running(WorkerProcess(tmp_path, settings, light=True)), Client(url) as client:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "status", "--watch", "--json", "--sample", "0", "--every", "0.2",
            env=environment_of(url), cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            await shows_in_hand(process, 0)
            jobs = [await client.start({"prompt": f"until={end}", "audio_format": "wav"}) for _ in range(2)]
            await shows_in_hand(process, 2)
            end.touch()
            for job in jobs:
                await job.wait(WITHIN_S)
            await shows_in_hand(process, 0)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def shows_in_hand(process: asyncio.subprocess.Process, wanted: int) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(WITHIN_S):
        while json.loads(await process.stdout.readline())["queue"]["unacked"] != wanted:
            pass


async def test_a_login_that_may_not_ask_the_workers_hears_events_all_the_same(
    amqp_url: str, amqp_vhost: str, management: ManagementApi
) -> None:
    await declare(amqp_url)
    name = f"listener-{amqp_vhost}"
    management.call("PUT", f"/api/users/{name}", {"password": "secret", "tags": ""})
    rights = {"configure": r"^acestep\.client\.", "write": r"^acestep\.client\.", "read": ".*"}
    management.call("PUT", f"/api/permissions/{amqp_vhost}/{name}", rights)
    try:
        async with consuming(amqp_url, "w1", 2) as channel, announcing(channel, announcement("w1", 2)):
            found = await answer(str(URL(amqp_url).with_user(name).with_password("secret")), "--sample", "2")
    finally:
        management.call("DELETE", f"/api/users/{name}")
    assert [each["worker_id"] for each in found["workers"]] == ["w1"]
    assert any("the workers were not asked" in note for note in found["notes"])


async def test_what_was_sent_on_is_told_by_tier_with_a_warning_where_nobody_of_it_is_there(amqp_url: str) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "test") as link:
        for tier in ("tier6", "unlimited"):
            await link.declare_tier_queue(tier)
    async with consuming(amqp_url, "w1", 2) as channel:
        for tier, count in (("tier6", 1), ("unlimited", 2)):
            for _ in range(count):
                await channel.default_exchange.publish(aio_pika.Message(b"{}"), tier_queue(tier), timeout=10)
        async with announcing(channel, announcement("w1", 2)):
            found = await answer(amqp_url, "--sample", "3", ACESTEP_ROUTE_BY_TIER="true")
            plain = await answer(amqp_url, "--sample", "0")
    assert found["tiers"] == [{"tier": "tier6", "ready": 1}, {"tier": "unlimited", "ready": 2}]
    assert found["queue"]["ready"] == 0
    (warning,) = (note for note in found["notes"] if "waiting in" in note)
    assert "2 waiting in acestep.generate.unlimited, and no worker of unlimited answered" in warning
    assert plain["tiers"] is None


async def test_a_tier_table_that_cannot_be_read_is_an_error_of_usage(amqp_url: str, tmp_path: Path) -> None:
    table = tmp_path / "tiers.toml"
    table.write_text("version = 1")
    code, out, err = await run_status(amqp_url, ACESTEP_ROUTE_BY_TIER="true", ACESTEP_TIER_TABLE=str(table))
    assert (code, out) == (2, "")
    assert str(table) in err


async def test_its_table_survives_an_output_that_is_not_utf_8(amqp_url: str) -> None:
    await declare(amqp_url)
    variables = {"ACESTEP_AMQP_URL": amqp_url, "PYTHONIOENCODING": "ascii"}
    done = await asyncio.to_thread(run_command, "status", variables=variables)
    assert (done.returncode, done.stdout.isascii()) == (0, True), done.stderr
    assert "acestep.generate" in done.stdout or "backlog" in done.stdout


async def test_dead_letters_and_events_that_nobody_heard_are_counted(amqp_url: str) -> None:
    await declare(amqp_url)
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        await publish(channel, DEAD_LETTER, "")
        await publish(channel, EVENTS, "job.progress.x")
    code, out, err = await run_status(amqp_url, "--sample", "0")
    assert code == 0, err
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert "1; see acestep-consumer dead list" in lines["dead letters"]
    assert lines["unrouted events"].strip() == "1, kept; harmless: no subscriber was connected"
    assert "none: no requests are taken" in lines["workers"]
    assert "\x1b[" not in out


async def test_an_empty_broker_says_that_nothing_is_declared_and_stays_empty(
    amqp_url: str, amqp_vhost: str, management: ManagementApi
) -> None:
    found = await answer(amqp_url, "--sample", "0")
    assert found["queue"]["ready"] == 0
    assert any("there is no queue acestep.generate yet" in note for note in found["notes"])
    assert management.call("GET", f"/api/queues/{amqp_vhost}") == []


async def test_no_queue_is_left_behind(amqp_url: str, amqp_vhost: str, management: ManagementApi) -> None:
    await declare(amqp_url)
    before = {queue["name"] for queue in management.call("GET", f"/api/queues/{amqp_vhost}")}
    await answer(amqp_url, "--sample", "0.2")
    assert {queue["name"] for queue in management.call("GET", f"/api/queues/{amqp_vhost}")} == before


async def test_an_api_that_is_away_is_a_note_and_no_error(amqp_url: str) -> None:
    await declare(amqp_url)
    found = await answer(amqp_url, "--sample", "0", ACESTEP_MANAGEMENT_URL="http://127.0.0.1:1")
    assert any("no answer from ACESTEP_MANAGEMENT_URL" in note for note in found["notes"])


async def test_a_user_who_sees_no_connections_still_gets_the_numbers(
    amqp_url: str, amqp_vhost: str, rabbitmq: RabbitMQ, management: ManagementApi
) -> None:
    """The broker tells users with the tag management of their own connections alone."""
    await declare(amqp_url)
    name = f"viewer-{amqp_vhost}"
    management.call("PUT", f"/api/users/{name}", {"password": "secret", "tags": "management"})
    rights = {"configure": "^$", "write": "^$", "read": ".*"}
    management.call("PUT", f"/api/permissions/{amqp_vhost}/{name}", rights)
    try:
        async with consuming(amqp_url, "gpu-0", 5):
            url = rabbitmq.management_url.replace("//", f"//{name}:secret@")
            async with ManagementClient(broker_settings(amqp_url, management_url=url)) as monitor:

                async def counted() -> bool:
                    return bool((await monitor.request_queue()).consumers)

                await until(counted, "the API's statistics are up to date", every_s=API_POLL_S)
                (consumer,) = (await monitor.request_queue()).consumers
    finally:
        management.call("DELETE", f"/api/users/{name}")
    assert consumer.prefetch == 5


async def test_a_lost_connection_is_made_again(amqp_url: str, amqp_vhost: str, management: ManagementApi) -> None:
    await declare(amqp_url)
    async with BrokerInspection(broker_settings(amqp_url), "test") as inspection:
        assert await inspection.depths([GENERATE]) == {GENERATE: QueueDepth(0, 0)}

        async def closed() -> bool:
            return management.close_connections(amqp_vhost) > 0

        await until(closed, "the API sees the connection", every_s=API_POLL_S)

        async def again() -> bool:
            try:
                return await inspection.depths([GENERATE]) == {GENERATE: QueueDepth(0, 0)}
            except ConnectionLost:
                return False

        await until(again, "it is connected again", WITHIN_S)


@pytest.mark.parametrize("arguments", [(), ("--json",), ("--watch",)])
async def test_no_broker_ends_with_4_and_one_line(arguments: tuple[str, ...]) -> None:
    code, out, err = await run_status("amqp://127.0.0.1:1/", *arguments)
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    assert "check ACESTEP_AMQP_URL, or run acestep-consumer doctor" in err


def test_watch_prints_a_line_each_time_until_ctrl_c(amqp_url: str) -> None:
    asyncio.run(declare(amqp_url))
    with subprocess.Popen(
        [sys.executable, "-m", "acestep_consumer", "status", "--watch", "--json", "--sample", "0", "--every", "0.2"],
        env=environment_of(amqp_url),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
        watching.send_signal(signal.SIGINT)
        assert watching.wait(WITHIN_S) == 130
        assert "Traceback" not in watching.stderr.read()
    assert first["time"] < second["time"]


async def test_refusals_at_the_same_time_cost_no_connection(amqp_url: str) -> None:
    """Each closes its channel. Its number must not be given to the next channel before the broker knows of that."""
    wanted = topology(broker_settings(amqp_url))
    async with BrokerInspection(broker_settings(amqp_url), "test") as inspection:
        for _ in range(30):
            found = await inspection.compare(wanted)
            assert len(found.missing) == len(wanted.exchanges) + len(wanted.queues)
