# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer cancel`` as a person runs it, on a real broker, with and without somebody who obeys."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from acestep_consumer.broker.cancellations import CancellationLog
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.domain.ports import Reply
from acestep_schemas.events import ErrorCode, ErrorReport, TerminalEvent, Unfinished, parse_event, unfinished_event
from tests.support.broker import broker_settings, failed_event
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, clean_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


def arguments(url: str, *given: str) -> tuple[list[str], dict[str, str]]:
    return [*COMMAND, "cancel", *given], clean_environment({"ACESTEP_AMQP_URL": url, "COLUMNS": "200"})


async def cancel(url: str, *given: str) -> subprocess.CompletedProcess[str]:
    command, environment = arguments(url, *given)
    return await asyncio.to_thread(
        subprocess.run,
        command,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


def cancelled_event(task_id: str) -> TerminalEvent:
    error = ErrorReport(code=ErrorCode.CANCELLED, message="cancelled on request", retryable=False, attempts=1)
    data = Unfinished(
        task_id=task_id, status="cancelled", attempt=1, worker_id="w1", finished_at=datetime.now(UTC), error=error
    )
    return unfinished_event(data)


@asynccontextmanager
async def worker(url: str, ends: dict[str, Callable[[str], TerminalEvent]]) -> AsyncIterator[CancellationLog]:
    """The broker's side of a worker, which ends each task as ``ends`` says once it is to be cancelled."""
    async with (
        BrokerConnection(broker_settings(url), "control") as link,
        BrokerConnection(broker_settings(url), "publish") as out,
    ):
        known = CancellationLog(link)
        await known.start()
        publisher = Publisher(out, "w1")

        async def obey(task_id: str) -> None:
            await known.wait(task_id, None)
            await publisher.publish(ends[task_id](task_id), Reply())

        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(obey(task_id)) for task_id in ends]
            yield known
            for task in working:
                task.cancel()


async def test_ids_are_printed_once_and_reach_the_workers(amqp_url: str) -> None:
    async with worker(amqp_url, {}) as known:
        sent = datetime.now(UTC)
        done = await cancel(amqp_url, "t1", "t2", "t1")
        assert (done.returncode, done.stdout) == (0, "t1\nt2\n")
        assert "2 cancellations sent. Whether such a job exists was not checked" in done.stderr
        await asyncio.wait_for(asyncio.gather(known.wait("t1", sent), known.wait("t2", sent)), 10)


async def test_who_waits_hears_how_each_one_ended(amqp_url: str) -> None:
    async with worker(amqp_url, {"t1": cancelled_event, "t2": cancelled_event}):
        done = await cancel(amqp_url, "t1", "t2", "--wait")
        assert (done.returncode, set(done.stdout.splitlines())) == (0, {"t1 cancelled", "t2 cancelled"})


async def test_one_that_ended_otherwise_gives_1_and_its_event_as_json(amqp_url: str) -> None:
    async with worker(amqp_url, {"t1": cancelled_event, "t2": failed_event}):
        done = await cancel(amqp_url, "t1", "t2", "--json")
        assert done.returncode == 1
        events = [parse_event(line.encode()) for line in done.stdout.splitlines()]
        assert {json.loads(event.to_json())["data"]["status"] for event in events} == {"cancelled", "failed"}


async def test_who_waits_for_a_job_that_does_not_end_is_told_so_in_time(amqp_url: str) -> None:
    async with worker(amqp_url, {"t1": cancelled_event}) as known:
        done = await cancel(amqp_url, "t1", "gone", "--timeout", "3")
        assert (done.returncode, done.stdout) == (1, "t1 cancelled\n")
        assert "gone: no terminal event within 3 s. It may have ended earlier or not exist" in done.stderr
        assert known.is_cancelled("gone", None)


async def test_ctrl_c_leaves_with_130_and_the_cancellation_stays(amqp_url: str) -> None:
    async with worker(amqp_url, {}) as known:
        command, environment = arguments(amqp_url, "t1", "--wait")
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        await asyncio.wait_for(known.wait("t1", None), 30)
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 130
        assert b"Traceback" not in errors


async def test_without_workers_the_next_one_knows(amqp_url: str) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "topology"):
        pass
    assert (await cancel(amqp_url, "t1")).returncode == 0
    async with worker(amqp_url, {}) as known:
        assert known.is_cancelled("t1", None)


async def test_before_anybody_declared_the_queues_it_says_what_to_do(amqp_url: str) -> None:
    for wait in ((), ("--wait",)):
        done = await cancel(amqp_url, "t1", *wait)
        assert (done.returncode, done.stdout) == (4, "")
        assert "topology --declare" in " ".join(done.stderr.split())


@pytest.mark.parametrize("task_id", ["a b", "a.b", "../a", "", "#"])
async def test_what_is_no_task_id_is_refused_before_anything_is_sent(task_id: str) -> None:
    done = await cancel("amqp://user:sesame@127.0.0.1:1/", "t1", task_id)
    assert done.returncode == 2
    assert "is not a task id" in done.stderr


async def test_a_broker_out_of_reach_ends_with_4_and_names_the_setting() -> None:
    done = await cancel("amqp://user:sesame@127.0.0.1:1/", "t1")
    assert done.returncode == 4
    assert "ACESTEP_AMQP_URL" in done.stderr
    assert "sesame" not in done.stderr
