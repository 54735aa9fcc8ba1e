# SPDX-License-Identifier: Apache-2.0
"""The workers of ``run --gpus`` and their parent as processes: signals, deaths, restarts, two real workers."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.client import Client
from acestep_schemas.events import JobCompleted, JobEvent, JobStarted, WorkerEvent
from infra.local.process import tail
from tests.support.command import run_command
from tests.support.waiting import eventually
from tests.support.worker import COMMAND
from tests.support.worker_group import WorkerGroupProcess

DOUBLE = [sys.executable, "-m", "tests.support.worker_double"]
LOAD_S = 120.0
BOTH = {"host-gpu0", "host-gpu1"}
QUICK = {"audio_duration": 10, "inference_steps": 4}
SLOW = {"audio_duration": 30, "inference_steps": 30}


def double(folder: Path, name: str, what: str = "drain", **variables: str) -> dict[str, dict[str, str]]:
    """The placement of a double that does ``what``."""
    notes, release = folder / f"{name}.notes", folder / "release"
    return {name: {"DOUBLE": what, "NOTES": str(notes), "RELEASE": str(release), **variables}}


def group_of(folder: Path, *doubles: dict[str, dict[str, str]], **options: Any) -> WorkerGroupProcess:
    placements = {name: environment for each in doubles for name, environment in each.items()}
    return WorkerGroupProcess(folder, DOUBLE, placements, {}, **options)


def notes(folder: Path, name: str) -> list[str]:
    """The signals that this worker has heard."""
    file = folder / f"{name}.notes"
    return file.read_text().split() if file.exists() else []


async def all_up(group: WorkerGroupProcess, count: int) -> None:
    """Wait until this many workers have come up."""
    await eventually(lambda: group.log.read_text().count("up\n") == count)


async def exit_code(group: WorkerGroupProcess) -> int | None:
    await eventually(lambda: not group.process.running())
    return group.process.returncode()


def signals_held_for(pid: int) -> int:
    """The signals that wait for a process to listen, a bit each."""
    return int(Path(f"/proc/{pid}/status").read_text().split("ShdPnd:")[1].split()[0], 16)


async def test_a_ctrl_c_of_the_terminal_reaches_each_worker_once_and_so_does_the_second(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0"), double(tmp_path, "gpu1")) as group:
        await all_up(group, 2)
        for times in (1, 2):
            os.killpg(group.process.id.pid, signal.SIGINT)
            await eventually(lambda: notes(tmp_path, "gpu0") == notes(tmp_path, "gpu1") == ["SIGINT"] * times)  # noqa: B023 - awaited before the next turn
        (tmp_path / "release").touch()
        assert await exit_code(group) == 0
    assert notes(tmp_path, "gpu0") == notes(tmp_path, "gpu1") == ["SIGINT", "SIGINT"]


async def test_sigterm_waits_for_every_worker_and_ends_with_0(tmp_path: Path) -> None:
    at_once = double(tmp_path, "gpu1", "drain", RELEASE=str(tmp_path))
    with group_of(tmp_path, double(tmp_path, "gpu0"), at_once) as group:
        await all_up(group, 2)
        os.kill(group.process.id.pid, signal.SIGTERM)
        await eventually(lambda: group.log.read_text().count("left\n") == 1)
        assert group.process.running()
        (tmp_path / "release").touch()
        assert await exit_code(group) == 0
        assert group.log_lines(event="all workers ended")[0]["exit_codes"] == {"gpu0": 0, "gpu1": 0}
    assert notes(tmp_path, "gpu0") == notes(tmp_path, "gpu1") == ["SIGTERM"]


async def test_a_worker_that_is_killed_is_replaced_and_the_other_goes_on(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0"), double(tmp_path, "gpu1")) as group:
        await all_up(group, 2)
        killed, other = group.worker("gpu0"), group.worker("gpu1")
        os.kill(killed.pid, signal.SIGKILL)
        await all_up(group, 3)
        (died,) = group.log_lines(event="worker died")
        assert (died["gpu"], died["exit_code"], died["restarts_in_s"]) == ("gpu0", 137, 0.5)
        assert group.worker("gpu0") != killed
        assert group.worker("gpu1") == other
        assert other.alive()
        (tmp_path / "release").touch()
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 0


async def test_a_worker_that_cannot_work_is_not_started_again_and_the_other_goes_on(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0", "exit 5"), double(tmp_path, "gpu1")) as group:
        await all_up(group, 1)
        await eventually(lambda: group.log_lines(gpu="gpu0", exit_code=5, others=["gpu1"]))
        assert group.worker("gpu1").alive()
        (tmp_path / "release").touch()
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 5
        assert len(group.log_lines(event="worker started", gpu="gpu0")) == 1


@pytest.mark.parametrize(("first", "second", "code"), [(5, 5, 5), (2, 0, 2), (0, 5, 5), (0, 0, 0)])
async def test_the_parent_ends_when_no_worker_is_left(tmp_path: Path, first: int, second: int, code: int) -> None:
    doubles = double(tmp_path, "gpu0", f"exit {first}"), double(tmp_path, "gpu1", f"exit {second}")
    with group_of(tmp_path, *doubles) as group:
        assert await exit_code(group) == code
        assert len(group.log_lines(event="worker started")) == 2


async def test_a_worker_that_dies_at_every_start_is_tried_at_growing_intervals_until_a_signal(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0", "exit 1")) as group:
        await eventually(lambda: len(group.log_lines(event="worker died")) == 3)
        assert [line["restarts_in_s"] for line in group.log_lines(event="worker died")] == [0.5, 1.0, 2.0]
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 0
        assert len(group.log_lines(event="worker started")) == 3


async def test_settings_that_had_a_worker_running_are_tried_again_when_a_restart_is_refused(tmp_path: Path) -> None:
    """Storage may be away for a while: a worker that starts then leaves with 2."""
    with group_of(tmp_path, double(tmp_path, "gpu0", "exit 1,exit 2,drain"), steady_s=0) as group:
        await all_up(group, 1)
        assert [line["exit_code"] for line in group.log_lines(event="worker died")] == [1, 2]
        (tmp_path / "release").touch()
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 0


async def test_settings_that_never_had_a_worker_running_are_not(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0", "exit 1,exit 2,drain")) as group:
        assert await exit_code(group) == 2


async def test_a_worker_that_does_not_listen_yet_runs_no_job_so_sigterm_still_ends_with_0(
    tmp_path: Path,
) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0", "deaf")) as group:
        await all_up(group, 1)
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 0


async def test_sighup_has_every_worker_read_its_settings_and_none_leave(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0"), double(tmp_path, "gpu1")) as group:
        await all_up(group, 2)
        os.kill(group.process.id.pid, signal.SIGHUP)
        await eventually(lambda: notes(tmp_path, "gpu0") == notes(tmp_path, "gpu1") == ["SIGHUP"])
        killed = group.worker("gpu0")
        os.kill(killed.pid, signal.SIGKILL)
        await all_up(group, 3)
        os.kill(group.process.id.pid, signal.SIGTERM)
        # Released only then: a double that has heard SIGHUP leaves as soon as it is.
        await eventually(lambda: "SIGTERM" in notes(tmp_path, "gpu0") and "SIGTERM" in notes(tmp_path, "gpu1"))
        (tmp_path / "release").touch()
        assert await exit_code(group) == 0
    assert notes(tmp_path, "gpu1") == ["SIGHUP", "SIGTERM"]
    assert notes(tmp_path, "gpu0") == ["SIGHUP", "SIGTERM"], "one that starts later reads its settings anyway"


async def test_a_worker_that_does_not_listen_yet_does_not_die_of_sighup(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0", "deaf")) as group:
        await all_up(group, 1)
        os.kill(group.process.id.pid, signal.SIGHUP)
        await eventually(lambda: group.log_lines(event="signal forwarded", signal="SIGHUP"))
        await eventually(lambda: signals_held_for(group.worker("gpu0").pid) == 1 << (signal.SIGHUP - 1))
        assert group.worker("gpu0").alive()
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 0


@pytest.mark.parametrize("labelled", [False, True])
async def test_workers_drain_and_leave_when_the_parent_is_killed(tmp_path: Path, labelled: bool) -> None:  # noqa: FBT001 - a parameter
    variables = {"LABELLED": "1"} if labelled else {}
    doubles = [double(tmp_path, name, "drain", **variables) for name in ("gpu0", "gpu1")]
    with group_of(tmp_path, *doubles, labelled=labelled) as group:
        await all_up(group, 2)
        workers = [group.worker("gpu0"), group.worker("gpu1")]
        os.kill(group.process.id.pid, signal.SIGKILL)
        await eventually(lambda: notes(tmp_path, "gpu0") == notes(tmp_path, "gpu1") == ["SIGTERM"])
        assert all(worker.alive() for worker in workers), "they still run jobs"
        (tmp_path / "release").touch()
        await eventually(lambda: not any(worker.alive() for worker in workers))


async def test_labelled_output_tells_whose_line_it_is(tmp_path: Path) -> None:
    with group_of(tmp_path, double(tmp_path, "gpu0"), double(tmp_path, "gpu3"), labelled=True) as group:
        await eventually(lambda: {"gpu0 | up", "gpu3 | up"} <= set(group.log.read_text().splitlines()))
        (tmp_path / "release").touch()
        os.kill(group.process.id.pid, signal.SIGTERM)
        assert await exit_code(group) == 0
        assert {"gpu0 | left", "gpu3 | left"} <= set(group.log.read_text().splitlines())


@pytest.fixture
def variables(service_environment: dict[str, str], tiny_checkpoints: Path, tmp_path: Path) -> dict[str, str]:
    """Settings that real workers have in common."""
    return service_environment | {
        "ACESTEP_CHECKPOINT_DIR": str(tiny_checkpoints),
        "ACESTEP_INIT_LLM": "false",
        "ACESTEP_HTTP_PORT": "0",
        "ACESTEP_SCRATCH_DIR": str(tmp_path),
        "ACESTEP_LOG_FORMAT": "json",
        "ACESTEP_DEVICE": "cpu",
    }


def real_group(folder: Path, variables: dict[str, str]) -> WorkerGroupProcess:
    """Two real workers, on the CPU."""
    placements = {name: {"ACESTEP_WORKER_ID": f"host-{name}"} for name in ("gpu0", "gpu1")}
    return WorkerGroupProcess(folder, [*COMMAND, "run"], placements, variables)


async def ready(group: WorkerGroupProcess, count: int) -> None:
    """Wait until workers have become ready this many times."""
    deadline = time.monotonic() + LOAD_S
    while len(group.log_lines(event="ready")) < count:
        assert group.process.running(), tail(group.log)
        assert time.monotonic() < deadline, tail(group.log)
        await asyncio.sleep(0.1)


@dataclass
class JobClient:
    """Submits jobs and waits for their events."""

    client: Client
    events: AsyncIterator[JobEvent | WorkerEvent]

    async def submit(self, count: int, **fields: object) -> set[str]:
        """Task ids of this many new jobs."""
        return {await self.client.submit({"prompt": "x", **fields}) for _ in range(count)}

    async def wait_for(self, kind: type[JobEvent], task_ids: set[str]) -> set[str]:
        """The workers that said this of these jobs, once it was said of each."""
        missing, workers = set(task_ids), set()
        async with asyncio.timeout(LOAD_S):
            while missing:
                event = await anext(self.events)
                if isinstance(event, kind) and event.subject in missing:
                    missing.remove(event.subject)
                    workers.add(event.source.rpartition("/")[2])
        return workers


@asynccontextmanager
async def job_client(url: str) -> AsyncIterator[JobClient]:
    async with Client(url) as client, client.subscribe("job.#") as events:
        yield JobClient(client, events)


async def test_two_workers_serve_one_queue_and_sigterm_finishes_the_jobs_of_both(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    with real_group(tmp_path, variables) as group:
        await ready(group, 2)
        async with job_client(variables["ACESTEP_AMQP_URL"]) as client:
            assert await client.wait_for(JobCompleted, await client.submit(8, **QUICK)) == BOTH
            last = await client.submit(2, **SLOW)
            assert await client.wait_for(JobStarted, last) == BOTH
            os.kill(group.process.id.pid, signal.SIGTERM)
            assert await client.wait_for(JobCompleted, last) == BOTH
        assert await exit_code(group) == 0
        assert {line["worker"] for line in group.log_lines(event="draining")} == BOTH


async def test_no_job_is_lost_when_a_worker_is_killed_nor_when_the_parent_is(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    with real_group(tmp_path, variables) as group:
        await ready(group, 2)
        async with job_client(variables["ACESTEP_AMQP_URL"]) as client:
            jobs = await client.submit(2, **SLOW)
            await client.wait_for(JobStarted, jobs)
            os.kill(group.worker("gpu0").pid, signal.SIGKILL)
            await client.wait_for(JobCompleted, jobs)
            await ready(group, 3)
            jobs = await client.submit(2, **SLOW)
            assert await client.wait_for(JobStarted, jobs) == BOTH
            workers = [group.worker("gpu0"), group.worker("gpu1")]
            os.kill(group.process.id.pid, signal.SIGKILL)
            assert await client.wait_for(JobCompleted, jobs) == BOTH, "they drain"
        await eventually(lambda: not any(worker.alive() for worker in workers))


FAKE_TORCH = """
import sys
if "acestep_consumer.multi_gpu.device_count" not in sys.orig_argv:
    raise ModuleNotFoundError("No module named 'torch'", name="torch")
class cuda:
    device_count = lambda: 2
class version:
    cuda, hip = "13.0", None
__version__ = "2.11"
"""


def run_with_gpus(variables: dict[str, str], *arguments: str) -> tuple[int, list[dict[str, object]]]:
    """Exit code and log of ``acestep-consumer run`` with these arguments."""
    done = run_command("run", *arguments, variables=variables)
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def test_the_command_starts_a_worker_for_each_gpu_with_its_options_and_ends_with_their_exit_code(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    """Torch is one that sees two GPUs and cannot be imported by an engine: each worker starts and gives up."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    del variables["ACESTEP_DEVICE"]
    variables |= {"PYTHONPATH": str(tmp_path), "ACESTEP_WORKER_ID": "host"}
    code, log = run_with_gpus(variables, "--gpus", "1,0", "--http-port", "0", "--device", "auto")
    assert code == 5
    (starts,) = [line for line in log if line["event"] == "starting one worker per GPU"]
    assert starts["workers"] == {"gpu1": "host-gpu1", "gpu0": "host-gpu0"}
    assert {line["worker"] for line in log if line["event"] == "starting"} == BOTH
    reasons = {line["worker"]: line["reason"] for line in log if line["event"] == "engine cannot start"}
    assert set(reasons) == BOTH
    assert all("torch is missing" in str(reason) for reason in reasons.values())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--gpus", "0,x"), 2, "give `all`, or numbers"),
        (("--gpus", "all", "--device", "cpu"), 2, "ACESTEP_DEVICE=cpu"),
        (("--gpus", "2"), 5, "there are 2, numbered 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_before_a_worker_starts(
    tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    refused, log = run_with_gpus({"PYTHONPATH": str(tmp_path)}, *arguments)
    assert refused == code
    (line,) = log
    assert says in str(line["reason"])
