# SPDX-License-Identifier: Apache-2.0
"""The checks of ``doctor`` on this machine: packages, GPU, encoders, scratch folder, port."""

import asyncio
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import aiohttp

from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.commands.doctor.report import Finding, fail, ok, skip, warn
from acestep_consumer.commands.plan import gpu as gpus
from acestep_consumer.commands.plan.gpu import DetectedGpu, DeviceMissing
from acestep_consumer.commands.plan.survey import PlanQuestion, PlanSurvey
from acestep_consumer.commands.threads import run_in_thread
from acestep_consumer.config.http import NETWORK_ERRORS, open_session
from acestep_consumer.config.settings import EngineSettings, Settings, WorkerSettings
from acestep_consumer.engine.compiler import compiler_fault
from acestep_consumer.policy.scoring import ScoreTableError, load_score_table
from acestep_consumer.policy.tiers import TierTable, TierTableError, load_table, others

INSTALL: Final = "pip install 'acestep-consumer[engine]'"
INSTALL_INT8: Final = "pip install 'acestep-consumer[int8]', or unset ACESTEP_QUANTIZATION"
PACKAGES: Final = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "av", "numpy")
# The largest batch of the longest songs in the largest format is 1.8 GB.
ENOUGH_BYTES, LEAST_BYTES = 2 << 30, 256 << 20
_MANY_JOBS: Final = 4
_TRY_BYTES: Final = 1 << 20


class Machine:
    """Checks this machine. The GPU is detected once, and several checks wait for it."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self._gpu: asyncio.Task[DetectedGpu] | None = None

    async def packages(self) -> AsyncGenerator[Finding]:
        """Find the packages of the engine processes, without importing them."""
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            yield fail("packages", f"missing: {', '.join(missing)}", INSTALL)
            return
        if self._settings.engine.quantization and find_spec("torchao") is None:
            yield fail("packages", "ACESTEP_QUANTIZATION=int8 needs torchao, which is missing", INSTALL_INT8)
            return
        yield ok("packages", f"torch {_version('torch')}, diffusers {_version('diffusers')}, PyAV {_version('av')}")

    async def device(self) -> AsyncGenerator[Finding]:
        """Detect the GPU and its tier; read the tables that a worker reads at its start."""
        try:
            load_score_table(self._settings.engine.score_table)
        except ScoreTableError as error:
            yield fail("score table", str(error))
        try:
            table = load_table(self._settings.worker.tier_table)
        except TierTableError as error:
            yield fail("tier table", str(error))
            return
        try:
            found = await self.gpu()
        except DeviceMissing as error:
            yield fail("device", str(error), "correct ACESTEP_DEVICE")
            return
        yield judge_gpu(found, self._settings.engine, torch=_version("torch"))
        yield judge_tier(found, table, self._settings)
        if (advice := judge_concurrency(found, table, self._settings)) is not None:
            yield advice

    async def gpu(self) -> DetectedGpu:
        """Return the GPU that a worker would use, with the memory of MAX_CUDA_VRAM if set. Raises ``DeviceMissing``."""
        if self._gpu is None:
            engine = self._settings.engine
            self._gpu = asyncio.create_task(run_in_thread(lambda: gpus.find(engine.device, self._environ)))
        found = await asyncio.shield(self._gpu)
        memory = self._settings.engine.max_vram_gb
        return found if memory is None else replace(found, vram_gb=memory)

    async def encoders(self) -> AsyncGenerator[Finding]:
        """Try the encoders in a subprocess, since FFmpeg may crash."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "acestep_consumer.engine.probe_encoders",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.communicate()  # to the end of its pipes: a loop that is closed cannot close them
        for finding in judge_encoders(process.returncode, out.decode(), err.decode()):
            yield finding

    async def compiler(self) -> AsyncGenerator[Finding]:
        """Try the compiler that ``torch.compile`` needs, where the models would be compiled."""
        engine = self._settings.engine
        try:
            found = await self.gpu()
        except DeviceMissing:
            yield skip("compiler", "it depends on the device")
            return
        kind = found.kind if found.vram_gb and found.by != "none" else "cpu"
        if not (kind == "cuda" if engine.compile is None else engine.compile):
            yield ok("compiler", "not needed: the models are not compiled on this device")
            return
        yield judge_compiler(await run_in_thread(lambda: compiler_fault(kind)))

    async def scratch(self) -> AsyncGenerator[Finding]:
        """Write to the scratch folder."""
        folder = self._settings.engine.scratch_dir or Path(tempfile.gettempdir())
        yield await run_in_thread(lambda: check_scratch(folder))

    async def port(self) -> AsyncGenerator[Finding]:
        """Check that the port for health checks and metrics is free."""
        yield await check_port(self._settings.worker)


def judge_gpu(found: DetectedGpu, engine: EngineSettings, *, torch: str | None) -> Finding:
    """Report the GPU, and whether torch can use it."""
    source = found.by if engine.max_vram_gb is None else "MAX_CUDA_VRAM"
    if engine.device.strip().lower() == "cpu":
        return ok("device", "CPU, as set by ACESTEP_DEVICE; a song takes minutes")
    if found.by == "none" and not found.vram_gb:
        fix = "CPU rendering takes minutes per song; set ACESTEP_DEVICE=cpu to silence this"
        return warn("device", f"no GPU: {found.why}", fix)
    said = f"{found.name}, {found.vram_gb:.1f} GB (from {source})"
    if found.by == "nvidia-smi" and torch is not None and "+cpu" in torch:
        return fail("device", f"{said}, but torch {torch} is a build without CUDA", "install a CUDA build of torch")
    return ok("device", said)


def judge_tier(found: DetectedGpu, table: TierTable, settings: Settings) -> Finding:
    """Report the tier's limits, and whether the models fit."""
    said = table.in_words(found.vram_gb)
    other = "".join(f". Not in force: {each.in_words(found.vram_gb)}" for each in others(table))
    plan = PlanSurvey(settings, table, found, PlanQuestion()).plan()
    if found.vram_gb and not plan.fits:
        return warn("tier", f"{said}; {plan.workers.because}{other}", "acestep-consumer plan shows which models fit")
    return ok("tier", f"{said}{other}")


def judge_concurrency(found: DetectedGpu, table: TierTable, settings: Settings) -> Finding | None:
    """Warn where the default, one job at a time, leaves most of a GPU idle."""
    plan = PlanSurvey(settings, table, found, PlanQuestion()).plan()
    if settings.broker.queue_workers != 1 or not plan.fits or plan.workers.recommended < _MANY_JOBS:
        return None
    said = f"one job at a time; this GPU works on about {plan.workers.recommended} at once"
    return warn("concurrency", said, "set ACESTEP_QUEUE_WORKERS=auto, or a number: acestep-consumer plan")


def judge_compiler(fault: str | None) -> Finding:
    """Report whether kernels can be compiled; without, a worker starts all the same."""
    if fault is None:
        return ok("compiler", "can compile kernels")
    said, _, fix = fault.rpartition("; ")
    return warn("compiler", f"{said}: the models run uncompiled, which is slower", f"{fix}, or ACESTEP_COMPILE=false")


def judge_encoders(code: int | None, out: str, err: str) -> Iterator[Finding]:
    """Read the output of the subprocess."""
    try:
        found = json.loads(out)
        missing, decoder = set(FORMATS) - set(found["formats"]), found["decoder"]
    except (ValueError, KeyError, TypeError):
        reason = err.strip().rpartition("\n")[2] or f"exit code {code}"
        yield fail("encoders", f"check failed: {reason}", INSTALL)
        return
    if missing:
        said = f"missing: {', '.join(sorted(missing))}; requests for these formats are rejected"
        yield warn("encoders", said, "install PyAV's wheels, which include FFmpeg: pip install -U av")
    else:
        yield ok("encoders", f"{', '.join(found['formats'])} available")
    yield ok("decoder", "audio inputs can be decoded") if decoder is None else fail("decoder", str(decoder))


def check_scratch(folder: Path) -> Finding:
    """Write a file to the folder, or to its nearest existing parent: a worker creates the rest."""
    existing = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    fix = "free some space, or set ACESTEP_SCRATCH_DIR to another folder"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * _TRY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return fail("scratch", f"cannot write to {folder}: {error.strerror or error}", fix)
    said = f"{folder}: {free / 1e9:.1f} GB free"
    if free < LEAST_BYTES:
        return fail("scratch", said, fix)
    return ok("scratch", said) if free >= ENOUGH_BYTES else warn("scratch", f"{said}; a large job needs 2 GB", fix)


async def check_port(worker: WorkerSettings) -> Finding:
    """Try to bind the port; if that fails, check whether a worker uses it."""
    host, port = worker.http_host, worker.http_port
    if port == 0:
        return ok("port", "any free one, chosen at start (ACESTEP_HTTP_PORT=0)")
    try:
        _bind(host, port)
    except OSError as error:
        if await _is_worker(host, port):
            said = f"port {port} is in use by another worker"
            return warn("port", said, "for a second worker, set ACESTEP_HTTP_PORT to another port, or to 0")
        said = f"cannot listen on {host}:{port}: {error.strerror or error}"
        fix = "set ACESTEP_HTTP_PORT to a free port, and ACESTEP_HTTP_HOST to an address of this machine"
        return fail("port", said, fix)
    return ok("port", f"{host}:{port} is free")


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


async def _is_worker(host: str, port: int) -> bool:
    timeout = aiohttp.ClientTimeout(total=5)
    with suppress(*NETWORK_ERRORS, ValueError):
        async with open_session(timeout=timeout) as http, http.get(f"http://{host}:{port}/healthz") as answer:
            return bool(await answer.json() == {"status": "alive"})
    return False


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None
