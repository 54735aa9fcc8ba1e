# SPDX-License-Identifier: Apache-2.0
"""Engine processes in tests: supervisors of the double in this process, and the real ones of a worker process."""

import asyncio
import os
import signal
from asyncio import Task
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Plan, Rendering, Sources
from acestep_consumer.engine.adapters import RendererSupervisor
from acestep_consumer.engine.messages import Configure
from acestep_consumer.engine.watchdog import WatchdogLimits
from acestep_schemas.events import Metas
from tests.support.admission import admitted_job
from tests.support.event_recorder import EventRecorder
from tests.support.worker import WorkerProcess

DOUBLE = "tests.support.engine_double"

ONE_MODEL = {"ACESTEP_CONFIG_PATH2": ""}
"""Settings of a worker whose renderer is up sooner."""

THINKING = {"ACESTEP_INIT_LLM": "true", "ACESTEP_LM_BACKEND": "pt"}
"""Settings of a worker that has the tiny language model."""


def supervisor(model: str = "any", max_attempts: int = 2, **limits: Any) -> RendererSupervisor:
    """A supervisor of the double; ``model`` and the jobs' prompts say how it behaves."""
    configure = Configure(settings=EngineSettings(config_path=model))
    return RendererSupervisor(
        configure, max_attempts=max_attempts, limits=WatchdogLimits(check_interval_s=0.02, **limits), module=DOUBLE
    )


@asynccontextmanager
async def supervised(max_attempts: int = 2, **limits: Any) -> AsyncIterator[RendererSupervisor]:
    """A supervisor with its process up, ended afterwards."""
    engine = supervisor(max_attempts=max_attempts, **limits)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def render(engine: RendererSupervisor, folder: Path, prompt: str, **fields: object) -> Rendering:
    """Render one job."""
    job = admitted_job(prompt=prompt, **fields)
    return await engine.render(job, Plan(metas=Metas()), Sources(), folder, lambda *_: None)


@dataclass(frozen=True)
class RequestLog:
    """Requests that entered and left each process, as the double logged them."""

    file: Path

    @property
    def entries(self) -> list[tuple[str, str, int]]:
        """Process, ``in`` or ``out``, and the request's seed."""
        if not self.file.exists():
            return []
        lines = (line.split() for line in self.file.read_text().splitlines())
        return [(pid, way, int(seed)) for pid, way, seed in lines]

    @property
    def processes(self) -> list[list[int]]:
        """The seeds that went into each process, in the order of the processes and of their coming."""
        came: dict[str, list[int]] = {}
        for pid, way, seed in self.entries:
            if way == "in":
                came.setdefault(pid, []).append(seed)
        return list(came.values())


def meet(engine: RendererSupervisor, folder: Path, company: int, seed: int, *, fatal: bool = False) -> Task[Rendering]:
    """Send a request that waits in the process until so many have come; logged in ``folder / "requests.log"``."""
    songs = folder / str(seed)
    songs.mkdir()
    word = "meet-and-crash" if fatal else "meet"
    return asyncio.create_task(render(engine, songs, f"{word} {folder / 'requests.log'} {company}", seed=seed))


def pid_of(worker: WorkerProcess, engine: str) -> int | None:
    """Process id of a worker's ``renderer`` or ``planner``, while there is one."""
    for pid in worker.children():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"acestep_consumer.engine.{engine}".encode() in words:
            return pid
    return None


def signal_engine(worker: WorkerProcess, engine: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to one of a worker's engines; returns its process id."""
    pid = pid_of(worker, engine)
    assert pid is not None, f"no {engine}"
    os.kill(pid, number)
    return pid


def state_of(worker: WorkerProcess, engine: str) -> dict[str, Any]:
    """What the worker's readiness page says of an engine; empty while the page does not answer."""
    _, body = worker.get("/readyz")
    found: dict[str, Any] = body["engines"].get(engine, {}) if body else {}
    return found


def at_work(recorder: EventRecorder, stage: str, since: int = 0) -> bool:
    """Whether some job told of progress in this stage, from the event with this number on."""
    return any(event.state == "progress" and event.data["stage"] == stage for event in recorder.events[since:])


def ends(recorder: EventRecorder, names: Iterable[str]) -> dict[str, list[str]]:
    """How each job ended, as often as it was told."""
    return {name: [event.state for event in recorder.terminal(name)] for name in names}
