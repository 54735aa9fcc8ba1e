# SPDX-License-Identifier: Apache-2.0
"""Songs a minute of whole workers, from RabbitMQ to S3, with one GPU or several: the memo's workload.

Every request thinks, wants one song of 300 seconds and gives its metadata, so that a song is 1,500 guided codes of the
language model (with ``--lm none`` no codes), 8 steps of the DiT, decoding, encoding and an upload. The models have the
full shapes and random weights. The worker is started as an operator starts it; a client keeps the queue filled and
counts the events.

The clock starts once as many songs are done as all workers have in flight, and runs for ``--seconds``. The first
requests are spread over ``--spread`` seconds: jobs that begin together would also end together, in waves that a short
window cannot average. ``--sweep`` measures several choices of GPUs one after the other, with the same checkpoints.
``--then-one`` stops all workers but the first after the window and measures again, which spares a start;
``--workloads`` measures several workloads one after the other with the same worker.

A table goes to standard error, a line of JSON for each result to standard output. It ends within ``--limit-s`` seconds.

Run: ``python -m tests.bench.bench_worker_gpu --local --gpus all``, and to try it out on a CPU
``python -m tests.bench.bench_worker_gpu --local --tiny --lm tiny --backend pt --duration 10 --workers 4``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import aio_pika
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerRefused
from acestep_consumer.broker.topology import GENERATE
from acestep_consumer.client import Client, ClientError
from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.config.settings import Settings, SettingsError, load
from acestep_consumer.domain.stages import STAGES
from acestep_consumer.multi_gpu import device_count, selection
from infra.local.ports import LOOPBACK
from infra.local.process import Process, ProcessId, ServerError, tail
from infra.local.signals import stop_cleanly_on_signals
from infra.local.stack import Environment, Stack
from tests.bench.worker_load import POLL_S, WORKLOADS, Load, LoadError, Tally, Workload, usual_fields

ROOT: Final = Path(__file__).parents[2]
NO_GPUS: Final = "none"
DIT: Final = "acestep-v15-turbo"
TINY_LM: Final = "acestep-5Hz-lm-0.6B"
NO_LM: Final = "none"

_STAGES = ("queued", "plan", "render", "encode", "upload", "total")
_LONGEST_QUEUE = 1_000_000
_TAIL_LINES = 60
_SAMPLE_S = 2.0
_WRITE_S = 150.0
_CONNECT_S = 20.0
_END_S = 15.0
"""What the end of a worker may take, and is kept back from its share of the time."""
_LEAST_WINDOW_S = 5.0
_ALONE_S = 10.0
"""The ramp of the worker that is left when the others were stopped: it has jobs in progress already."""
_TICKS = os.sysconf("SC_CLK_TCK")
_GIB = 1 << 30


class BenchError(Exception):
    """A configuration gave no number; the text says why."""


class Budget:
    """The time that is left, of all that the benchmark may take."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s
        last = threading.Timer(limit_s, _give_up)
        last.daemon = True
        last.start()

    def left(self) -> float:
        """Seconds until everything has to be over."""
        return self._end - time.monotonic()

    def share(self, parts: int) -> float:
        """Seconds that one of ``parts`` configurations may take, its worker's end left out."""
        return self.left() / parts - _END_S


@dataclass(frozen=True, slots=True)
class Deployment:
    """One configuration: ``gpus`` as for ``run --gpus`` or ``none``; ``workers`` processes, each with this prefetch."""

    gpus: str
    prefetch: int
    workers: int

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return f"{'no --gpus' if self.gpus == NO_GPUS else f'--gpus {self.gpus}'} --workers {self.prefetch}"

    @property
    def in_flight(self) -> int:
        """Jobs that all workers run at once."""
        return self.workers * self.prefetch


class Scrapes:
    """The numbers of the workers' /metrics pages and the cards' power, read again and again."""

    def __init__(self, ports: Iterable[int]) -> None:
        self._pages: dict[int, list[dict[str, float]]] = {port: [] for port in ports}
        self._watts: list[float] = []

    async def take(self) -> None:
        """Read each page once; one that does not answer is left out."""
        for port, pages in self._pages.items():
            with suppress(OSError):
                pages.append(_numbers((await asyncio.to_thread(_get, port, "metrics")).decode()))
        self._watts += await asyncio.to_thread(_watts)

    def watts(self) -> float | None:
        """Return the mean power of all cards together; None: not known."""
        return statistics.fmean(self._watts) if self._watts else None

    def report(self) -> list[dict[str, float | None]]:
        """Return a row for each worker: the last value, and means over the window where one moment says little."""
        return [_row(pages) for pages in self._pages.values()]


def _row(pages: list[dict[str, float]]) -> dict[str, float | None]:
    def last(name: str, unit: float = 1) -> float | None:
        return round(pages[-1][name] / unit, 3) if pages and name in pages[-1] else None

    def mean(name: str) -> float | None:
        values = [page[name] for page in pages if name in page]
        return round(statistics.fmean(values), 2) if values else None

    def least(name: str) -> float | None:
        return min((page[name] for page in pages if name in page), default=None)

    def gained(name: str) -> float | None:
        return pages[-1][name] - pages[0][name] if pages and name in pages[0] and name in pages[-1] else None

    return {
        "gpu_idle_ratio": last("acestep_gpu_idle_ratio"),
        "vram_used_gib": last("acestep_vram_used_bytes", _GIB),
        "vram_limit_gib": last("acestep_vram_limit_bytes", _GIB),
        "pack_songs": last("acestep_pack_songs"),
        "pack_songs_mean": mean("acestep_pack_songs"),
        "pack_tokens_mean": mean("acestep_pack_tokens"),
        "in_hand_mean": mean("acestep_in_hand"),
        **{f"in_{stage}_mean": mean(f'acestep_stage_jobs{{stage="{stage}"}}') for stage in STAGES},
        "in_plan_least": least('acestep_stage_jobs{stage="plan"}'),
        "songs": gained("acestep_songs_total"),
        "memory_squeezes": gained("acestep_memory_squeezes_total"),
    }


def main() -> int:
    """Measure every configuration; 1 when one of them gave no number."""
    arguments = _parser().parse_args()
    if arguments.write:
        _write(arguments.write, arguments.checkpoints, arguments)
        return 0
    stop_cleanly_on_signals()
    set_up_logs("warning", "console")
    budget = Budget(arguments.limit_s)
    try:
        with ExitStack() as stack:
            return _run(stack, budget, arguments)
    except (BenchError, ServerError, SettingsError, OSError) as error:
        _say(f"error: {error}")
        return 1


def _run(stack: ExitStack, budget: Budget, arguments: argparse.Namespace) -> int:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acestep-", ignore_cleanup_errors=True)))
    deployments = [_deployment(text, arguments) for text in (arguments.sweep or arguments.gpus).split(";")]
    servers = _servers(stack, folder / "servers", arguments)
    asyncio.run(_refuse_strangers(servers.amqp_url))
    checkpoints = _checkpoints(folder, budget, arguments)
    logs = arguments.logs or folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for number, deployment in enumerate(deployments):
        site = Site(servers, checkpoints, logs / f"worker-{number}.log", folder, arguments)
        results += _attempt(site, deployment, budget.share(len(deployments) - number))
    _print_ratio(results)
    each = len(arguments.workloads.split(";")) if arguments.workloads else 1
    wanted = sum(each + (arguments.then_one and deployment.workers > 1) for deployment in deployments)
    return 0 if len(results) == wanted else 1


@dataclass(frozen=True, slots=True)
class Site:
    """Where a configuration is measured: servers, checkpoints, the worker's log, a folder for work files."""

    servers: Environment
    checkpoints: Path
    log: Path
    folder: Path
    arguments: argparse.Namespace

    def variables(self, deployment: Deployment, port: int) -> dict[str, str]:
        """The worker's environment: nothing of the caller's ACESTEP_ variables but what ``--set`` gives."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACESTEP_")}
        sound = str(ROOT / "tests/bench/sound") if self.arguments.sound == "music" else None
        path = os.pathsep.join((str(ROOT), *filter(None, [sound, inherited.get("PYTHONPATH")])))
        settings = {
            "ACESTEP_S3_PREFIX": f"bench-{time.time_ns()}",
            "ACESTEP_QUEUE_MAXSIZE": str(_LONGEST_QUEUE),
            "ACESTEP_QUEUE_WORKERS": str(deployment.prefetch),
            "ACESTEP_CHECKPOINT_DIR": str(self.checkpoints),
            "ACESTEP_CONFIG_PATH": DIT,
            "ACESTEP_INIT_LLM": "false" if self.arguments.lm == NO_LM else "true",
            "ACESTEP_LM_MODEL_PATH": _lm_name(self.arguments),
            "ACESTEP_LM_BACKEND": self.arguments.backend,
            "ACESTEP_HTTP_PORT": str(port),
            "ACESTEP_LOG_FORMAT": "json",
        }
        given = dict(pair.split("=", 1) for pair in self.arguments.set)
        return {**inherited, "PYTHONPATH": path, **self.servers.variables(), **settings, **given}

    def settings(self, variables: Mapping[str, str]) -> Settings:
        """The same, as the worker reads it."""
        return load(variables, env_file=None)


def _attempt(site: Site, deployment: Deployment, share_s: float) -> list[dict[str, Any]]:
    """Measure one configuration; what went wrong is told with the end of the worker's log, and is no reason to stop."""
    _say(f"\n== {deployment.name} ({share_s:.0f} s at most) ==")
    results: list[dict[str, Any]] = []
    try:
        asyncio.run(Trial(site, deployment, share_s).run(results))
    except (
        BenchError,
        LoadError,
        ClientError,
        BrokerRefused,
        ServerError,
        SettingsError,
        TimeoutError,
        AMQPError,
        OSError,
    ) as error:
        _say(f"error: {deployment.name}: {error or type(error).__name__}\n{tail(site.log, _TAIL_LINES)}")
    else:
        _tell_warnings(site.log)
    return results


class Trial:
    """One configuration from the start of its worker to its end. ``share_s``: the seconds it may take."""

    def __init__(self, site: Site, deployment: Deployment, share_s: float) -> None:
        self._site = site
        self._deployment = deployment
        self._end = time.monotonic() + share_s
        self._arguments = site.arguments
        self._ports = _free_row(deployment.workers)
        self._variables = site.variables(deployment, self._ports[0])
        self._worker: Process | None = None

    async def run(self, results: list[dict[str, Any]]) -> None:
        """Append a result for each window. Raises ``BenchError``, or what the servers and the client raise."""
        settings = self._site.settings(self._variables)
        await _clear_queue(settings)
        command = [sys.executable, "-m", "acestep_consumer", "run", "--grace", "1"]
        command += [] if self._deployment.gpus == NO_GPUS else ["--gpus", self._deployment.gpus]
        began = time.monotonic()
        self._worker = worker = Process(
            command, env=self._variables, folder=self._site.folder, log=self._site.log, guarded=True
        )
        try:
            ready_s = await self._wait_until_ready(worker, began)
            async with Client(settings.broker.url.get_secret_value()) as client:
                load = self._load(client)
                async with load.running() as feeding:
                    await self._windows(load, feeding, ready_s, results)
        finally:
            _end_all(worker)

    def _load(self, client: Client) -> Load:
        asked = self._arguments
        usual = usual_fields(asked, thinking=asked.lm != NO_LM)
        jobs = self._deployment.in_flight
        return Load(client, usual, self._workloads()[0], capacity=jobs, backlog=asked.backlog, spread_s=asked.spread)

    def _workloads(self) -> tuple[Workload, ...]:
        asked, jobs = self._arguments, self._deployment.in_flight
        if not asked.workloads:
            return (Workload(name=asked.audio_format, in_flight=jobs, seconds=asked.seconds),)
        return tuple(Workload.of(text, jobs, asked.seconds) for text in asked.workloads.split(";"))

    async def _windows(
        self, load: Load, feeding: asyncio.Future[Any], ready_s: float, results: list[dict[str, Any]]
    ) -> None:
        first, *others = self._workloads()
        both = self._arguments.then_one and self._deployment.workers > 1
        seconds = min(first.seconds, (self._end - time.monotonic() - _END_S) / (2 if both else 1))
        if seconds < _LEAST_WINDOW_S:
            raise BenchError("no time is left for a window; raise --limit-s")
        # Time is kept for the second window and for the end of the others; the first one's ramp has the rest.
        kept = seconds + _END_S + _ALONE_S if both else 0
        await self._ramp(load, feeding, first.in_flight, self._end - seconds - kept)
        found = await self._window(load, feeding, self._deployment, replace(first, seconds=seconds))
        self._tell(results, {"ready_s": ready_s, **found})
        if both:
            await self._stop_others()
            # It goes on as before: what its share of the processor and of the disk changes shows soon.
            await self._ramp(load, feeding, self._deployment.in_flight, time.monotonic() + _ALONE_S)
            alone = Deployment("0 (others stopped)", self._deployment.prefetch, 1)
            self._tell(results, {"ready_s": None, **await self._window(load, feeding, alone, first)})
        for workload in others:
            await self._another(load, feeding, workload, results)

    async def _another(
        self, load: Load, feeding: asyncio.Future[Any], workload: Workload, results: list[dict[str, Any]]
    ) -> None:
        """Go on with another workload: what is in flight ends first, then as much again, then the window."""
        if self._end - time.monotonic() < workload.seconds + _END_S:
            _say(f"no time is left for {workload.name}")
            return
        _say(f"\n-- {workload.name}, {workload.in_flight} in flight")
        await load.change(workload, self._site.servers.amqp_url)
        await self._ramp(load, feeding, load.under_way() + workload.in_flight, self._end - workload.seconds)
        self._tell(results, {"ready_s": None, **await self._window(load, feeding, self._deployment, workload)})

    @staticmethod
    def _tell(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
        results.append(result)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()

    async def _wait_until_ready(self, worker: Process, began: float) -> float:
        deadline = min(self._end, began + self._arguments.ready_s)
        while not all([await asyncio.to_thread(_is_ready, port) for port in self._ports]):
            if not worker.running():
                raise BenchError(f"the worker ended with status {worker.returncode()} before it was ready")
            if time.monotonic() > deadline:
                raise BenchError(f"not ready after {time.monotonic() - began:.0f} s")
            await asyncio.sleep(POLL_S)
        ready_s = round(time.monotonic() - began, 1)
        _say(f"/readyz after {ready_s:.1f} s")
        return ready_s

    async def _ramp(self, load: Load, feeding: asyncio.Future[Any], jobs: int, latest: float) -> None:
        """Wait until so many more jobs are done, but not beyond ``latest`` or ``--ramp`` seconds."""
        began, before = time.monotonic(), load.tally.finished()
        end = min(latest, began + self._arguments.ramp)
        while time.monotonic() < end and load.tally.finished() < before + jobs:
            await self._rest(feeding)
        done = load.tally.finished() - before
        _say(f"ramp of {time.monotonic() - began:.1f} s: {done} jobs done{'' if done >= jobs else f', not {jobs}'}")

    async def _window(
        self, load: Load, feeding: asyncio.Future[Any], deployment: Deployment, workload: Workload
    ) -> dict[str, Any]:
        """Count what is done in the workload's seconds."""
        seconds = workload.seconds
        before = load.tally.finished()
        _say(f"counting for {seconds:.0f} s")
        ports = self._ports[: deployment.workers]
        scrapes, tree, start = Scrapes(ports), _cpu_seconds(self._pid()), time.monotonic()
        await scrapes.take()
        while (left := start + seconds - time.monotonic()) > 0:
            await self._rest(feeding, min(_SAMPLE_S, left))
            await scrapes.take()
        end, cpu = time.monotonic(), _cpu_used(tree, _cpu_seconds(self._pid()))
        result = _result(deployment, load.tally, (start, end), self._arguments, workload)
        watts = scrapes.watts()
        result |= {
            "jobs_before": before,
            "watts": watts and round(watts),
            "joules_per_song": None if watts is None else round(watts * (end - start) / max(result["songs"], 1), 1),
            "cores": {role: round(used / (end - start), 2) for role, used in cpu.items()},
            "metrics": scrapes.report(),
            "nvidia_smi": await asyncio.to_thread(_nvidia_smi),
        }
        _print_result(result, load.tally)
        if not result["songs"]:
            raise BenchError("no song was completed in the window")
        return result

    async def _rest(self, feeding: asyncio.Future[Any], seconds: float = POLL_S) -> None:
        await asyncio.wait((feeding,), timeout=seconds)
        if feeding.done():
            feeding.result()
        if self._worker is not None and not self._worker.running():
            raise BenchError(f"the worker ended with status {self._worker.returncode()}")

    async def _stop_others(self) -> None:
        """Stop every worker but the first, and wait until they have ended."""
        for pid in _worker_pids(self._site.log)[1:]:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        while any([await asyncio.to_thread(_answers, port) for port in self._ports[1:]]):
            if time.monotonic() > deadline:
                raise BenchError("the other workers did not end")
            await asyncio.sleep(POLL_S)
        _say("the other workers have ended; their jobs are back in the queue")

    def _pid(self) -> int:
        assert self._worker is not None
        return self._worker.id.pid


def _result(
    deployment: Deployment, tally: Tally, window: tuple[float, float], arguments: argparse.Namespace, workload: Workload
) -> dict[str, Any]:
    start, end = window
    done = tally.between(start, end)
    audio_s = sum(audio.duration_s for _, event in done for audio in event.audios)
    third = (end - start) / 3
    thirds = [len(tally.between(start + n * third, start + (n + 1) * third)) for n in range(3)]
    songs = [(audio.duration_s, event.request.audio_duration or 0) for _, event in done for audio in event.audios]
    totals = [event.timings.total for _, event in done if event.timings.total is not None]
    return {
        "bench": "worker",
        "sound": arguments.sound,
        "gpus": deployment.gpus,
        "workers": deployment.workers,
        "prefetch": deployment.prefetch,
        "workload": workload.name,
        "in_flight": workload.in_flight,
        "seconds": round(end - start, 1),
        "songs": len(done),
        "songs_per_minute": round(60 * len(done) / (end - start), 2),
        "songs_per_minute_by_third": [round(60 * count / third, 1) for count in thirds],
        "audio_s_per_s": round(audio_s / (end - start), 1),
        "odd_lengths": sum(abs(length - asked) > 1 for length, asked in songs),
        "total_s_median": round(statistics.median(totals), 3) if totals else None,
        "failed": sum(start < at <= end for at, _ in tally.unfinished),
        "failed_before": sum(at <= start for at, _ in tally.unfinished),
        "stage_s": {stage: _mean(getattr(event.timings, stage) for _, event in done) for stage in _STAGES},
        "mb_per_song": _mean(audio.bytes / 1e6 for _, event in done for audio in event.audios),
        "by_worker": _counts(event.worker_id for _, event in done),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 3) if known else None


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name] += 1
    return dict(sorted(counts.items()))


def _print_result(result: Mapping[str, Any], tally: Tally) -> None:
    _say(
        f"{result['songs_per_minute']:.1f} songs/min: {result['songs']} songs in {result['seconds']:.0f} s, by third "
        f"{result['songs_per_minute_by_third']}; {result['audio_s_per_s']:.0f} s of audio a second"
    )
    _say(f"  seconds a stage  {result['stage_s']}")
    energy, median = result["joules_per_song"], result["total_s_median"]
    _say(f"  a song           {result['mb_per_song']} MB, {energy} J, median {median} s")
    _say(f"  by worker        {result['by_worker']}   cores in use {result['cores']}")
    for row in result["metrics"]:
        _say(f"  /metrics         {row}")
    for line in result["nvidia_smi"]:
        _say(f"  nvidia-smi       {line}")
    if result["odd_lengths"]:
        _say(f"  warning: {result['odd_lengths']} songs are not as long as asked for")
    if tally.completed:
        event = tally.completed[-1][1]
        changes = [(change.field, change.requested, change.applied) for change in event.policy.adjustments]
        _say(f"  the last event   lm {event.lm}, tier {event.policy.tier}, changed {changes}, {list(event.warnings)}")
    if tally.unfinished:
        _say(f"  {len(tally.unfinished)} jobs ended without a song, among them:")
    for _, unfinished in tally.unfinished[:3]:
        _say(f"    {unfinished.status} {unfinished.error.code}: {unfinished.error.message[:500]}")


def _print_ratio(results: list[dict[str, Any]]) -> None:
    """Of the most GPUs to the fewest; of the last to the first where they are equal."""
    if len({result["workload"] for result in results}) == 1 and len(results) > 1:
        few, *_, many = sorted(results, key=lambda result: int(result["workers"]))
        names = [f"--gpus {result['gpus']} --workers {result['prefetch']}" for result in (few, many)]
        ratio = many["songs_per_minute"] / few["songs_per_minute"]
        summary = {"bench": "worker", "ratio": round(ratio, 3), "from": names[0], "to": names[1]}
        sys.stdout.write(json.dumps(summary) + "\n")
        _say(f"\n{names[1]} makes {ratio:.2f} times the songs of {names[0]}")


def _tell_warnings(log: Path, most: int = 6) -> None:
    """The worker's own warnings and errors, each kind once."""
    seen: dict[str, str] = {}
    for entry in _entries(log):
        if entry.get("level") in {"warning", "error", "critical"}:
            seen.setdefault(str(entry.get("event")), json.dumps(entry)[:600])
    for line in list(seen.values())[:most]:
        _say(f"  log: {line}")


def _worker_pids(log: Path) -> list[int]:
    """Return the workers' process ids, as the log has them, in the order of the GPUs."""
    started = {str(e["gpu"]): int(e["pid"]) for e in _entries(log) if e.get("event") == "worker started"}
    return list(started.values())


def _entries(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def _deployment(text: str, arguments: argparse.Namespace) -> Deployment:
    """Read ``GPUS`` or ``GPUS@WORKERS``. Raises ``BenchError`` when there are no such GPUs."""
    chosen, _, workers = text.strip().partition("@")
    jobs = int(workers) if workers else arguments.workers
    if chosen == NO_GPUS:
        return Deployment(NO_GPUS, jobs, 1)
    environ = selection.in_pci_order(os.environ)
    try:
        found = selection.choose(selection.parse(chosen), selection.visible(device_count.ask_torch(environ), environ))
    except (selection.BadChoice, selection.GpuMissing, device_count.DeviceCountFailed) as error:
        raise BenchError(str(error)) from error
    return Deployment(chosen, jobs, len(found))


def _servers(stack: ExitStack, folder: Path, arguments: argparse.Namespace) -> Environment:
    """The servers that were named, or some of our own."""
    if arguments.local:
        return stack.enter_context(Stack(folder))
    if not arguments.amqp or not arguments.s3:
        raise BenchError("give --amqp URL and --s3 URL of servers that run, or --local")
    url = urlsplit(arguments.s3)
    if not (url.hostname and url.username and url.password and url.path.strip("/")):
        raise BenchError("--s3 must look like http://KEY:SECRET@HOST:PORT/BUCKET")
    return Environment(
        amqp_url=arguments.amqp,
        s3_endpoint=f"{url.scheme}://{url.netloc.rpartition('@')[2]}",
        s3_bucket=url.path.strip("/"),
        access_key=unquote(url.username),
        secret_key=unquote(url.password),
    )


def _checkpoints(folder: Path, budget: Budget, arguments: argparse.Namespace) -> Path:
    """Write the models, each in a process of its own, which gives the GPU's memory back; return their folder."""
    target: Path = (arguments.checkpoints or folder / "checkpoints").absolute()
    target.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    writers = []
    for what in ("dit",) if arguments.lm == NO_LM else ("dit", "lm"):
        command = [sys.executable, "-m", "tests.bench.bench_worker_gpu", "--write", what, "--lm", arguments.lm]
        command += ["--checkpoints", str(target), *(["--tiny"] if arguments.tiny else [])]
        log = folder / f"write-{what}.log"
        writers.append(Process(command, env=os.environ, folder=ROOT, log=log, guarded=True))
    deadline = began + min(_WRITE_S, budget.left() - _END_S)
    try:
        for writer in writers:
            while writer.running() and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if writer.returncode() != 0:
                raise BenchError(f"a checkpoint was not written (status {writer.returncode()})\n{tail(writer.log)}")
    finally:
        for writer in writers:
            writer.end(1)
    _say(f"checkpoints in {target} after {time.monotonic() - began:.1f} s")
    return target


def _write(what: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Write one model, unless it is there already. It gets its name when it is whole."""
    name = DIT if what == "dit" else _lm_name(arguments)
    if (folder / name).exists():
        return
    from acestep_consumer.engine.testing import tiny_checkpoint, tiny_lm  # noqa: PLC0415 - needs torch
    from tests.bench import full_size  # noqa: PLC0415 - as above
    from tests.bench.bench_plan_gpu import write_model  # noqa: PLC0415 - as above

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as unfinished:
        if what == "dit":
            (tiny_checkpoint if arguments.tiny else full_size).write(Path(unfinished))
        elif arguments.lm == "tiny":
            tiny_lm.write(Path(unfinished))
        else:
            write_model(Path(unfinished) / name, arguments.lm)
        if not (folder / name).exists():
            (Path(unfinished) / name).rename(folder / name)


def _lm_name(arguments: argparse.Namespace) -> str:
    return TINY_LM if arguments.lm == "tiny" else f"acestep-5Hz-lm-{arguments.lm}"


async def _refuse_strangers(url: str) -> None:
    """Raise ``BenchError`` when the broker is not there, or serves somebody else already."""
    try:
        async with asyncio.timeout(_CONNECT_S), await aio_pika.connect(url) as connection:
            queue = await (await connection.channel()).declare_queue(GENERATE, passive=True)
    except ChannelNotFoundEntity:
        return
    except (AMQPError, OSError, TimeoutError) as error:
        raise BenchError(f"no broker to run on: {error or type(error).__name__}") from error
    if queue.declaration_result.message_count or queue.declaration_result.consumer_count:
        raise BenchError(f"{GENERATE} has somebody's messages or workers: give the benchmark a broker of its own")


async def _clear_queue(settings: Settings) -> None:
    """Leave an empty queue with the benchmark's own length limit; a queue that another left behind is replaced."""
    async with asyncio.timeout(_CONNECT_S):
        connection = await aio_pika.connect(settings.broker.url.get_secret_value())
        async with connection:
            channel = await connection.channel()
            await channel.queue_delete(GENERATE)
        async with BrokerConnection(settings.broker, "bench"):
            pass  # it declares the topology


def _end_all(worker: Process) -> None:
    """End the worker and wait until its engines are gone: the next one needs their memory."""
    family = [process for pid in _tree(worker.id.pid) for process in _known(pid)]
    worker.end(_END_S - 5)
    deadline = time.monotonic() + 5
    while any(process.alive() for process in family) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in family:
        if process.alive():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _known(pid: int) -> Iterator[ProcessId]:
    with suppress(ProcessLookupError):
        yield ProcessId.of(pid)


def _tree(root: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def _cpu_seconds(root: int) -> dict[int, tuple[str, float]]:
    """What each process of the tree is for, and the processor seconds that it has used."""
    used: dict[int, tuple[str, float]] = {}
    for pid in _tree(root):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            used[pid] = _role(command), (int(fields[11]) + int(fields[12])) / _TICKS
    return used


def _role(command: str) -> str:
    roles = {
        "acestep_consumer.engine.renderer": "renderer",
        "acestep_consumer.engine.planner": "planner",
        "acestep_consumer.audio.encoding": "encoders",
        "acestep_consumer run": "consumer",
    }
    return next((role for words, role in roles.items() if words in command), "other")


def _cpu_used(before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]) -> dict[str, float]:
    used: dict[str, float] = defaultdict(float)
    for pid, (role, seconds) in after.items():
        used[role] += seconds - before.get(pid, (role, 0.0))[1]
    return dict(used)


def _nvidia_smi() -> list[str]:
    """Memory, use and power of each GPU that the worker may see, where the program is there."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index,memory.used,utilization.gpu,power.draw,clocks.sm"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=5, check=False
        )
        return done.stdout.strip().splitlines()
    return []


def _watts() -> list[float]:
    """The power of all cards together in a list of one; empty where it is not known."""
    powers = [line.split(",")[3].split()[0] for line in _nvidia_smi()]
    with suppress(ValueError):
        return [sum(map(float, powers))] if powers else []
    return []


def _free_row(count: int) -> tuple[int, ...]:
    """``count`` free ports side by side: a fleet counts up from the first."""
    for _ in range(1000):
        first = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        row = tuple(range(first, first + count))
        if all(map(_is_free, row)):
            return row
    raise BenchError(f"no {count} free ports side by side")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _get(port: int, page: str) -> bytes:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/{page}", timeout=5) as answer:
        return bytes(answer.read())


def _is_ready(port: int) -> bool:
    with suppress(OSError):
        _get(port, "readyz")
        return True
    return False


def _answers(port: int) -> bool:
    try:
        _get(port, "healthz")
    except urllib.error.HTTPError as error:
        return error.code != HTTPStatus.OK
    except OSError:
        return False
    return True


def _numbers(page: str) -> dict[str, float]:
    """The samples of a Prometheus page, with their labels; those of one name are added up besides."""
    numbers: dict[str, float] = defaultdict(float)
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not name.startswith("#"):
            with suppress(ValueError):
                numbers[name.partition("{")[0]] += float(value)
                if "{" in name:
                    numbers[name] = float(value)
    return dict(numbers)


def _give_up() -> None:
    """The last resort: guards end what was started once this process is gone."""
    _say("error: out of time")
    sys.stdout.flush()
    os._exit(3)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    servers = parser.add_argument_group("servers")
    servers.add_argument("--amqp", metavar="URL", help="a broker of the benchmark's own: it empties the queue")
    servers.add_argument("--s3", metavar="URL", help="http://KEY:SECRET@HOST:PORT/BUCKET")
    servers.add_argument("--local", action="store_true", help="start a broker and a store on this machine")
    models = parser.add_argument_group("models")
    models.add_argument("--lm", default="1.7B", choices=["0.6B", "1.7B", "4B", "tiny", NO_LM], help="(1.7B)")
    models.add_argument("--tiny", action="store_true", help="a tiny DiT, for a CPU")
    models.add_argument("--backend", default="vllm", choices=["vllm", "pt"], help="of the LM (vllm)")
    models.add_argument("--checkpoints", type=Path, help="write them here and keep them; what is there is used")
    work = parser.add_argument_group("work")
    work.add_argument("--gpus", default=NO_GPUS, help="for `run --gpus`: all, 0, 0,1 …; none: one plain worker (none)")
    work.add_argument(
        "--sweep", metavar="LIST", help="several of them, each GPUS or GPUS@WORKERS: '0;all' or '0@32;0@64'"
    )
    work.add_argument("--then-one", action="store_true", help="measure all workers, then the first one alone")
    work.add_argument(
        "--workloads",
        metavar="LIST",
        help=f"one after the other with the same worker, each NAME[@IN_FLIGHT][:SECONDS]: {', '.join(WORKLOADS)}",
    )
    work.add_argument("--workers", type=int, default=48, help="jobs in flight in each worker: its prefetch (48)")
    work.add_argument("--backlog", type=float, default=2, help="jobs that wait, for each in flight (2)")
    work.add_argument("--duration", type=float, default=300, help="seconds of a song (300)")
    work.add_argument("--audio-format", default="mp3", choices=["mp3", "flac", "wav", "opus", "aac"], help="(mp3)")
    work.add_argument(
        "--sound",
        default="noise",
        choices=["noise", "music"],
        help="what is encoded: the songs themselves, noise with random weights, or music-like tones instead (noise)",
    )
    work.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker")
    clock = parser.add_argument_group("time, in seconds")
    clock.add_argument("--seconds", type=float, default=60, help="the window (60)")
    clock.add_argument("--spread", type=float, default=30, help="over which the first jobs are handed in (30)")
    clock.add_argument("--ramp", type=float, default=120, help="at most, before the window opens (120)")
    clock.add_argument("--ready-s", type=float, default=180, help="for a worker's start (180)")
    clock.add_argument("--limit-s", type=float, default=280, help="for everything (280)")
    parser.add_argument("--logs", type=Path, help="folder for the workers' logs")
    parser.add_argument("--write", choices=["dit", "lm"], help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
