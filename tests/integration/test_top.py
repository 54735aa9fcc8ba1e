# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer top`` as a person runs it, on a worker's own pages."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.observability.http import HealthServer
from acestep_consumer.observability.job_stats import JobStats
from acestep_consumer.observability.metrics import Metrics, engine_metrics, renderer_metrics, worker_metrics
from acestep_schemas import examples
from infra.local.ports import PortClaim
from tests.support.engine_stats import engine_stats
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, clean_environment


@dataclass
class FakeConsumer:
    in_hand: int = 3
    prefetch: int = 8


@asynccontextmanager
async def worker_at_work(*, ready: bool = True, port: int = 0) -> AsyncIterator[HealthServer]:
    """The pages of a worker that ends ten songs a second."""
    usage = DeviceUsage()
    usage.process_ready(time.monotonic() - 30)
    usage.note(engine_stats(busy_s=15), time.monotonic())
    jobs = JobStats()
    page = Metrics(
        lambda: worker_metrics(FakeConsumer(), 200),
        jobs.collect,
        lambda: renderer_metrics(usage),
        lambda: engine_metrics({"renderer": 1}),
    )

    async def work() -> None:
        while True:
            await asyncio.sleep(0.1)
            jobs.job_ended(examples.completed().data, None)

    async with HealthServer({"storage": lambda: ready}, page.render, "127.0.0.1", port) as health:
        working = asyncio.create_task(work())
        try:
            yield health
        finally:
            working.cancel()
            await asyncio.wait({working})


async def start_top(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        "top",
        *arguments,
        env=clean_environment({"COLUMNS": "160", **variables}),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run_top(*arguments: str, **variables: str) -> tuple[int | None, str, str]:
    process = await start_top(*arguments, **variables)
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    return process.returncode, out.decode(), err.decode()


async def test_once_as_json_tells_rates_counted_over_a_second() -> None:
    async with worker_at_work() as health:
        code, out, err = await run_top("--once", "--json", "--url", f"http://127.0.0.1:{health.port}")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert (found["status"], found["checks"]) == ("ready", {"storage": True})
    assert (found["jobs"]["in_hand"], found["jobs"]["workers"]) == (3, 8)
    assert found["songs"]["a_minute"] > 0
    assert found["restarts"] == {"renderer": 1}
    assert found["storage"]["sent"] is None
    assert found["window_s"] >= 1


async def test_the_address_comes_from_the_settings() -> None:
    async with worker_at_work(ready=False) as health:
        port = health.port
        code, out, err = await run_top("--once", ACESTEP_HTTP_PORT=str(port))
    assert (code, err) == (0, "")
    assert f"http://127.0.0.1:{port}  not ready (storage)" in out
    assert "3 of 8" in out
    assert "\x1b[" not in out


async def test_nobody_there_ends_with_4_and_says_how_to_name_another() -> None:
    code, out, err = await run_top("--url", "127.0.0.1:1")
    assert (code, out) == (4, "")
    assert "no worker at http://127.0.0.1:1" in err
    assert "--url" in err


async def test_a_stranger_at_the_port_is_not_taken_for_a_worker() -> None:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        code, _, err = await run_top("--once", "--url", f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()
    assert code == 4
    assert "its /metrics returned 404: is it an acestep-consumer worker?" in err


@pytest.mark.parametrize("url", ["http://", "ftp://host", "http://host:port"])
async def test_an_address_that_is_none_is_a_wrong_use(url: str) -> None:
    code, _, err = await run_top("--once", "--url", url)
    assert code == 2
    assert f"{url} is not an address such as" in err


async def test_live_it_waits_for_a_worker_that_goes_and_comes_back() -> None:
    async with AsyncExitStack() as stack:
        claim = PortClaim(1)  # of a free one, somebody's connection could take it meanwhile
        stack.callback(claim.release)
        (port,) = claim.ports
        async with worker_at_work(port=port):
            process = await start_top("--url", f"http://127.0.0.1:{port}")
            stack.push_async_callback(ended, process)
            await read_until(process, "3 of 8")
        await read_until(process, "retrying")
        async with worker_at_work(port=port):
            await read_until(process, "3 of 8")
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), WITHIN_S) == 130


async def ended(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


async def read_until(process: asyncio.subprocess.Process, text: str) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(WITHIN_S):
        while text not in (line := (await process.stdout.readline()).decode()):
            assert line, f"it ended before it said {text!r}"
