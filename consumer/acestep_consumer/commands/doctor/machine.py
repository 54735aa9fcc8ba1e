# SPDX-License-Identifier: Apache-2.0
"""``doctor`` on this machine: packages, card, models, encoders, scratch folder, port. No model is loaded."""

import asyncio
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import aiohttp

from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.commands.doctor.report import Finding, fail, ok, warn
from acestep_consumer.commands.plan import gpu as cards
from acestep_consumer.commands.plan.gpu import DetectedGpu, DeviceMissing
from acestep_consumer.commands.plan.survey import PlanQuestion, PlanSurvey
from acestep_consumer.commands.threads import aside
from acestep_consumer.config.settings import EngineSettings, Settings, WorkerSettings
from acestep_consumer.policy.tiers import TierTable, TierTableError, load_table

INSTALL: Final = "pip install 'acestep-consumer[engine]'"
PACKAGES: Final = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "av", "numpy")
# The largest batch of the longest songs in the largest format is 1.8 GB.
ENOUGH_BYTES, LEAST_BYTES = 2 << 30, 256 << 20
_TRY_BYTES: Final = 1 << 20
_SLOW: Final = "the machine is busy; try again"


class Machine:
    """Looks at this machine with these settings. The card is looked for once, and several checks wait for it."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self._card: asyncio.Task[DetectedGpu] | None = None

    async def packages(self) -> AsyncGenerator[Finding]:
        """Look for what the engine processes import, without importing it."""
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            yield fail("packages", f"missing: {', '.join(missing)}", INSTALL)
            return
        yield ok("packages", f"torch {_version('torch')}, diffusers {_version('diffusers')}, PyAV {_version('av')}")

    async def device(self) -> AsyncGenerator[Finding]:
        """Find the card and its tier."""
        try:
            table = load_table(self._settings.worker.tier_table)
        except TierTableError as error:
            yield fail("tier table", str(error))
            return
        try:
            found = await self.card()
        except DeviceMissing as error:
            yield fail("device", str(error), "correct ACESTEP_DEVICE")
            return
        yield judge_card(found, self._settings.engine, torch=_version("torch"))
        yield judge_tier(found, table, self._settings)

    async def card(self) -> DetectedGpu:
        """Return the card that a worker would use, at the size that the settings pretend. Raises ``DeviceMissing``."""
        if self._card is None:
            engine = self._settings.engine
            self._card = asyncio.create_task(aside(lambda: cards.find(engine.device, self._environ)))
        found = await asyncio.shield(self._card)
        pretended = self._settings.engine.max_vram_gb
        return found if pretended is None else DetectedGpu(found.name, pretended, found.by, found.why, found.kind)

    async def encoders(self) -> AsyncGenerator[Finding]:
        """Have a process try them: FFmpeg stays out of this one."""
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
                await process.wait()
        for finding in judge_encoders(process.returncode, out.decode(), err.decode()):
            yield finding

    async def scratch(self) -> AsyncGenerator[Finding]:
        """Write to the folder for work files."""
        folder = self._settings.engine.scratch_dir or Path(tempfile.gettempdir())
        yield await aside(lambda: look_at_scratch(folder))

    async def port(self) -> AsyncGenerator[Finding]:
        """See whether the port of health and metrics is free."""
        yield await look_at_port(self._settings.worker)


def judge_card(found: DetectedGpu, engine: EngineSettings, *, torch: str | None) -> Finding:
    """Say which card it is, and whether it can be used."""
    pretended = "" if engine.max_vram_gb is None else " (MAX_CUDA_VRAM pretends that)"
    if engine.device.strip().lower() == "cpu":
        return ok("device", "the CPU, as ACESTEP_DEVICE says: a song takes minutes")
    if found.by == "nobody" and not found.vram_gb:
        return warn(
            "device", f"no GPU: {found.why}", "a song takes minutes on a CPU; ACESTEP_DEVICE=cpu says it is meant"
        )
    said = f"{found.name}, {found.vram_gb:.1f} GB{pretended}, from {found.by}"
    if found.by == "nvidia-smi" and torch is not None and "+cpu" in torch:
        return fail("device", f"{said}; but torch {torch} is a build without CUDA", "install torch for this card")
    return ok("device", said)


def judge_tier(found: DetectedGpu, table: TierTable, settings: Settings) -> Finding:
    """Say what the card may be asked for, and whether the models fit."""
    tier = table.tier_of(found.vram_gb)
    said = (
        f"{tier.name} of {table.version}: songs of up to {tier.max_seconds_with_lm} s with the LM and "
        f"{tier.max_seconds} s without, batches of up to {tier.max_batch_with_lm} and {tier.max_batch}"
    )
    plan = PlanSurvey(settings, table, found, PlanQuestion()).plan()
    if found.vram_gb and not plan.fits:
        return warn("tier", f"{said}; {plan.workers.because}", "acestep-consumer plan says what fits")
    return ok("tier", said)


def judge_encoders(code: int | None, out: str, err: str) -> Iterator[Finding]:
    """Read what the process printed."""
    try:
        told = json.loads(out)
        missing, decoder = set(FORMATS) - set(told["formats"]), told["decoder"]
    except (ValueError, KeyError, TypeError):
        reason = err.strip().rpartition("\n")[2] or f"exit code {code}"
        yield fail("encoders", f"cannot be tried: {reason}", INSTALL)
        return
    if missing:
        said = f"cannot be written: {', '.join(sorted(missing))}; requests for it are refused"
        yield warn("encoders", said, "install PyAV from its wheels, which bring their own FFmpeg: pip install -U av")
    else:
        yield ok("encoders", f"{', '.join(told['formats'])} can be written")
    yield ok("decoder", "audio inputs can be read") if decoder is None else fail("decoder", str(decoder))


def look_at_scratch(folder: Path) -> Finding:
    """Write a file into the folder, or into the nearest one above it that is there: a worker makes the rest."""
    there = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    fix = "make room, or set ACESTEP_SCRATCH_DIR to another folder"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * _TRY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        return fail("scratch", f"{folder} cannot be written: {error.strerror or error}", fix)
    said = f"{folder}: {free / 1e9:.1f} GB free"
    if free < LEAST_BYTES:
        return fail("scratch", said, fix)
    return ok("scratch", said) if free >= ENOUGH_BYTES else warn("scratch", f"{said}; a large job takes 2 GB", fix)


async def look_at_port(worker: WorkerSettings) -> Finding:
    """Try to bind it; where that fails, ask who is there."""
    host, port = worker.http_host, worker.http_port
    if port == 0:
        return ok("port", "a free one, chosen at the start (ACESTEP_HTTP_PORT=0)")
    try:
        _bind(host, port)
    except OSError as error:
        said = f"{host}:{port} cannot be had: {error.strerror or error}"
        if await _is_worker(host, port):
            return warn("port", f"{said}; a worker has it", "another worker on this machine needs another port")
        return fail("port", said, "set ACESTEP_HTTP_PORT to a free port, and ACESTEP_HTTP_HOST to an address of ours")
    return ok("port", f"{host}:{port} is free")


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        # As the server does: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


async def _is_worker(host: str, port: int) -> bool:
    timeout = aiohttp.ClientTimeout(total=1)
    with suppress(aiohttp.ClientError, TimeoutError, ValueError):
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(f"http://{host}:{port}/healthz") as answer:
            return bool(await answer.json() == {"status": "alive"})
    return False


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None
