# SPDX-License-Identifier: Apache-2.0
"""Commands whose server keeps its connections and answers nothing: they say so, and end soon when they are told to."""

from __future__ import annotations

import asyncio
import signal
import socket
import time

import pytest

from acestep_consumer.broker.connection import BrokerConnection
from tests.support.broker import broker_settings
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, clean_environment

# Two seconds, and a process's end on a busy machine.
AT_ONCE_S = 5.0
INTERRUPTED = 130


async def wait_for(stream: asyncio.StreamReader, words: str) -> None:
    """Read what a command prints until it says these words."""
    async with asyncio.timeout(WITHIN_S):
        while words not in (line := (await stream.readline()).decode()):
            assert line, f"it ended before it said {words!r}"


@pytest.mark.parametrize(
    ("arguments", "under_way", "number", "code"),
    [
        (["submit", "--prompt", "x", "--task-id", "t1", "--wait"], "accepted as t1", signal.SIGINT, INTERRUPTED),
        (["watch"], "watching", signal.SIGINT, INTERRUPTED),
        (["listen", "--port", "0"], "serving", signal.SIGINT, INTERRUPTED),
        (["gateway", "--port", "0"], "subscribed to events", signal.SIGTERM, 0),
    ],
    ids=["submit", "watch", "listen", "gateway"],
)
async def test_a_command_leaves_a_silent_broker_at_once(
    service_environment: dict[str, str], arguments: list[str], under_way: str, number: signal.Signals, code: int
) -> None:
    url = service_environment["ACESTEP_AMQP_URL"]
    async with BrokerConnection(broker_settings(url), "topology"):
        pass
    async with Proxy.for_url(url) as amqp:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            env=clean_environment(service_environment | {"ACESTEP_AMQP_URL": amqp.url(url)}),
            cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            await wait_for(process.stderr, under_way)
            amqp.stall()
            process.send_signal(number)
            began = time.monotonic()
            _, errors = await asyncio.wait_for(process.communicate(), WITHIN_S)
            assert time.monotonic() - began < AT_ONCE_S
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == code, errors
        assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["watch"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["watch", "t1"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["submit", "--prompt", "x"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["submit", "--prompt", "x", "--wait"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["cancel", "t1"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["cancel", "t1", "--wait"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["status"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["status", "--json"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["topology", "--declare"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["dead", "list"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["dead", "show", "t1"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["dead", "requeue", "--all"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["dead", "purge", "--all", "--yes"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["listen", "--port", "0"], "waiting for the broker (ACESTEP_AMQP_URL)"),
        (["download", "t1"], "waiting for the storage (ACESTEP_S3_ENDPOINT)"),
        (["lineage", "t1"], "waiting for the storage (ACESTEP_S3_ENDPOINT)"),
        (["doctor"], "waiting for an answer: broker, storage"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
async def test_a_command_says_what_it_waits_for(arguments: list[str], said: str) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel takes connections, and nobody reads them
    host, port = silent.getsockname()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    servers = {"ACESTEP_AMQP_URL": f"amqp://guest:guest@{host}:{port}/", "ACESTEP_S3_ENDPOINT": f"http://{host}:{port}"}
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        env=clean_environment(keys | servers),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        await wait_for(process.stderr, said)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        silent.close()


async def test_status_does_not_name_the_broker_alone_where_its_management_api_may_be_what_is_silent(
    service_environment: dict[str, str],
) -> None:
    async with BrokerConnection(broker_settings(service_environment["ACESTEP_AMQP_URL"]), "topology"):
        pass
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            "status",
            env=clean_environment(service_environment | {"ACESTEP_MANAGEMENT_URL": url}),
            cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            await wait_for(process.stderr, "or ACESTEP_MANAGEMENT_URL")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
