# SPDX-License-Identifier: Apache-2.0
"""Requests a second and latencies of `acestep-consumer gateway`, side by side with a bare aiohttp handler.

Nothing is faked: each `/release_task` is a persistent message that the broker has confirmed. There are no workers, so
that the numbers are the gateway's and the broker's alone. The bare handler answers the same bytes and does nothing:
what HTTP itself costs on this machine. `--beside URL` measures one server more, such as ACE-Step's own with faked
models.

`at once`: each client sends its next request when it has the answer to the last, which says how many a second a server
can do; latencies are then clients / rate, whatever the server. `paced`: each client sends one every `--every` seconds,
as ACE-Step's clients poll every two; its latencies are what a client sees. The clients run in one process and share the
machine with the servers.

At the end, memory of one gateway: before and after `--tasks` tasks, and at most during an upload of `--upload-mb`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aio_pika
import aiohttp
from aiohttp import web
from rich import box
from rich.console import Console
from rich.table import Table
from yarl import URL

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.topology import GENERATE
from acestep_consumer.config.http import open_session
from infra.local.process import Process, tail
from tests.bench.arena import BenchError, settings_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_BODY = {"prompt": "slow jazz with a warm double bass", "lyrics": "[verse]\nla la la", "audio_duration": 30}
_START_S = 60.0
_CONNECT_S = 15.0
_MIB = 1 << 20
_PERCENTILES = (50, 99)

_console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Lap:
    """What some clients saw of one route: seconds of each answer, other statuses than 200, and the time in all."""

    seconds: list[float]
    refused: dict[int, int]
    took_s: float

    def row(self) -> dict[str, Any]:
        """Return rate and percentiles, milliseconds."""
        ordered = sorted(self.seconds) or [0.0]
        last = len(ordered) - 1
        percentiles = {
            f"p{each}_ms": round(1000 * ordered[min(last, len(ordered) * each // 100)], 1) for each in _PERCENTILES
        }
        return {"rate": round(len(self.seconds) / self.took_s), **percentiles, "refused": self.refused}


class Connection:
    """One keep-alive connection that sends POST requests: an HTTP client that costs a tenth of aiohttp's."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._head = f"Host: {url.host}:{url.port}\r\nContent-Type: application/json\r\n"

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._url.host, self._url.port)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of the answer."""
        self._writer.write(f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if length is None:
            raise BenchError(f"no length in the answer to {path}: {head[:200]!r}")
        return int(head.split(b" ", 2)[1]), await self._reader.readexactly(int(length[1]))

    def close(self) -> None:
        """Close it."""
        self._writer.close()


class Clients:
    """Clients of one server, each with a connection and a task of its own. An async context manager."""

    def __init__(self, url: str, count: int) -> None:
        self._connections = [Connection(URL(url)) for _ in range(count)]
        self.task_ids: list[list[str]] = [[] for _ in range(count)]

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(connection.open() for connection in self._connections))
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()

    async def release(self, seconds: float, every_s: float) -> Lap:
        """Send tasks for so long. ``every_s``: how often each client does; 0: as fast as it is answered."""

        async def send(client: int) -> int:
            status, answer = await self._connections[client].post("/release_task", json.dumps(_BODY).encode())
            if status == 200:
                self.task_ids[client].append(json.loads(answer)["data"]["task_id"])
            return status

        return await self._lap(send, seconds, every_s)

    async def query(self, seconds: float, every_s: float) -> Lap:
        """Ask for the latest task of each client for so long."""
        bodies = [json.dumps({"task_id_list": ids[-1:]}).encode() for ids in self.task_ids]

        async def send(client: int) -> int:
            return (await self._connections[client].post("/query_result", bodies[client]))[0]

        return await self._lap(send, seconds, every_s)

    async def _lap(self, send: Callable[[int], Awaitable[int]], seconds: float, every_s: float) -> Lap:
        found: list[float] = []
        refused: dict[int, int] = {}
        begin = time.perf_counter()

        async def drive(client: int) -> None:
            due = begin + every_s * client / len(self._connections)
            while (now := time.perf_counter()) - begin < seconds:
                if every_s:
                    await asyncio.sleep(max(0.0, due - now))
                    due += every_s
                sent = time.perf_counter()
                status = await send(client)
                found.append(time.perf_counter() - sent)
                if status != 200:
                    refused[status] = refused.get(status, 0) + 1

        await asyncio.gather(*map(drive, range(len(self._connections))))
        return Lap(found, refused, time.perf_counter() - begin)


async def bare() -> None:
    """Serve constant answers of the same size until killed."""
    task_id = str(uuid.uuid4())
    shared = {"code": 200, "error": None, "timestamp": time.time_ns() // 1_000_000, "extra": None}
    accepted = {"data": {"task_id": task_id, "status": "queued", "queue_position": 1}, **shared}
    entry = {"task_id": task_id, "result": json.dumps([{"file": "", "status": 0, "stage": "queued"}] * 2), "status": 0}

    def route(answer: dict[str, Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            await request.json()
            return web.json_response(answer)

        return handle

    app = web.Application()
    app.router.add_post("/release_task", route(accepted))
    app.router.add_post("/query_result", route({"data": [entry], **shared}))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"http://127.0.0.1:{runner.addresses[0][1]}/\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


@contextmanager
def serving(folder: Path, *arguments: str, log: str) -> Iterator[tuple[str, Process]]:
    """Run a server of this file or the gateway; yields its address, which it writes to its log, and its process."""
    path = folder / log
    variables = {"ACESTEP_QUEUE_MAXSIZE": "1000000", "ACESTEP_LOG_LEVEL": "warning", "ACESTEP_SCRATCH_DIR": str(folder)}
    process = Process(
        [sys.executable, "-m", *arguments], env=os.environ | variables, folder=Path.cwd(), log=path, guarded=True
    )
    try:
        deadline = time.monotonic() + _START_S
        while (
            found := re.search(r"^(http://\S+?)/?$", path.read_text() if path.exists() else "", re.MULTILINE)
        ) is None:
            if not process.running() or time.monotonic() > deadline:
                raise BenchError(f"{arguments[-1]} did not start: {tail(path)}")
            time.sleep(0.05)
        yield found[1], process
    finally:
        process.end(5)


async def measure(name: str, url: str, process: Process | None, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each route and way of asking."""
    rows = []
    async with Clients(url, arguments.clients) as clients:
        await clients.release(arguments.seconds / 5, 0)  # connections, caches and the broker's queue get warm
        for way, every_s in (("at once", 0.0), ("paced", arguments.every)):
            for route in ("release", "query"):
                before = processor_s(process)
                lap = await getattr(clients, route)(arguments.seconds, every_s)
                cost = round(1000 * (processor_s(process) - before) / len(lap.seconds), 2) if process else None
                rows.append({"server": name, "route": route, "way": way, **lap.row(), "cpu_ms": cost})
                _console.print(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
    return rows


async def memory(url: str, process: Process, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return megabytes of a gateway: before tasks, after them, and at most while a large file is uploaded."""
    found: dict[str, Any] = {"tasks": arguments.tasks, "upload_mb": arguments.upload_mb, "start_mb": resident(process)}
    async with Clients(url, min(arguments.clients, 50)) as clients:
        for part in ("half_mb", "end_mb"):
            done = sum(map(len, clients.task_ids))
            while sum(map(len, clients.task_ids)) - done < arguments.tasks / 2:
                await clients.release(0.5, 0)
            await clients.query(0.5, 0)
            found[part] = resident(process)
    peak, watching = [resident(process)], True

    async def watch() -> None:
        while watching:
            peak.append(resident(process))
            await asyncio.sleep(0.02)

    watcher = asyncio.create_task(watch())
    began = time.perf_counter()
    found["upload_status"] = await upload(url, arguments.upload_mb)
    found["upload_s"] = round(time.perf_counter() - began, 1)
    watching = False
    await watcher
    return found | {"upload_before_mb": peak[0], "upload_peak_mb": max(peak)}


async def upload(url: str, megabytes: int) -> int:
    """Upload a file of random bytes as a source; return the status."""

    async def content() -> Any:
        for _ in range(megabytes):
            yield os.urandom(_MIB)

    with aiohttp.MultipartWriter("form-data") as form:
        part = form.append_payload(aiohttp.AsyncIterablePayload(content()))
        form.append("cover").set_content_disposition("form-data", name="task_type")
        part.set_content_disposition("form-data", name="src_audio", filename="song.wav")
    async with open_session() as session, session.post(f"{url}/release_task", data=form) as answer:
        return answer.status


def processor_s(process: Process | None) -> float:
    """Return processor seconds that a process has used; 0 where it is not ours."""
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.id.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process: Process) -> float:
    """Megabytes of memory of a process."""
    status = Path(f"/proc/{process.id.pid}/status").read_text(encoding="ascii")
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


async def run(arguments: argparse.Namespace, servers: Sequence[str]) -> dict[str, Any]:
    """Measure each server in turn."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    settings = settings_for(1)
    try:
        async with asyncio.timeout(_CONNECT_S), BrokerConnection(settings.broker, "bench"):
            pass  # it declares the topology
    except (BrokerRefused, TimeoutError) as error:
        raise BenchError(f"no broker to run on: {error or 'ACESTEP_AMQP_URL does not answer'}") from error
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="acestep-bench-")))
        for name in servers:
            if name == "gateway":
                with serving(folder, "acestep_consumer", "gateway", "--port", "0", log="gateway.log") as (url, process):
                    await ready(url)
                    rows += await measure(name, url, process, arguments)
                    if arguments.tasks:
                        found = await memory(url, process, arguments)
            elif name == "bare aiohttp":
                command = ("tests.bench.bench_gateway", "--serve-bare")
                with serving(folder, *command, log="bare.log") as (url, process):
                    rows += await measure(name, url, process, arguments)
            else:
                rows += await measure(name, name, None, arguments)
    # The request queue has the benchmark's own length limit: a worker that comes later must find another.
    async with await aio_pika.connect(settings.broker.url.get_secret_value()) as connection:
        await (await connection.channel()).queue_delete(GENERATE)
    return {"rows": rows, "memory": found}


async def ready(url: str) -> None:
    """Wait until a gateway is connected to the broker."""
    async with asyncio.timeout(_START_S), open_session() as session:
        while True:
            async with session.get(f"{url}/readyz") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.1)


def main() -> int:
    """Run the benchmark: a table on standard error, one line of JSON on standard output."""
    arguments = _parser().parse_args()
    if arguments.serve_bare:
        asyncio.run(bare())
        return 0
    try:
        found = asyncio.run(run(arguments, ("bare aiohttp", "gateway", *arguments.beside)))
    except (BenchError, OSError) as error:
        _console.print(f"error: {error}", markup=False)
        return 1
    _console.print(_table(found["rows"]))
    load = round(os.getloadavg()[0], 1)
    machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "load": load}
    sys.stdout.write(json.dumps({"bench": "gateway", **machine, "clients": arguments.clients, **found}) + "\n")
    return 0


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE)
    for title in ("server", "route", "way", "requests/s", "p50 ms", "p99 ms", "CPU ms"):
        table.add_column(title, justify="left" if title in ("server", "route", "way") else "right")
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("server", "route", "way", "rate", "p50_ms", "p99_ms", "cpu_ms")))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash infra/dev bench gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200, help="concurrent clients (200)")
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement (10)")
    parser.add_argument("--every", type=float, default=2, help="seconds between the requests of a paced client (2)")
    parser.add_argument("--beside", nargs="*", default=[], metavar="URL", help="further servers of the same API")
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks for the measurement of memory; 0: none")
    parser.add_argument("--upload-mb", type=int, default=100, help="size of the upload (100)")
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
