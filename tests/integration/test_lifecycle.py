# SPDX-License-Identifier: Apache-2.0
"""How a worker starts, refuses to start, and leaves."""

import os
import signal
import time
from pathlib import Path

import pytest

from acestep_consumer.client import Client
from acestep_schemas.events import JobCompleted, WorkerEvent
from tests.support.broker import Peer, until
from tests.support.command import run_command
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess

SLOW = {"audio_duration": 60, "inference_steps": 40}


@pytest.fixture
def environment(service_environment: dict[str, str], tiny_checkpoints: Path) -> dict[str, str]:
    return service_environment | {"ACESTEP_CHECKPOINT_DIR": str(tiny_checkpoints)}


def refused_start(environment: dict[str, str], folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and log of a worker that does not start."""
    here = {"ACESTEP_HTTP_PORT": "0", "ACESTEP_SCRATCH_DIR": str(folder)}
    done = run_command("run", variables=environment | here | variables)
    return done.returncode, done.stderr


@pytest.mark.usefixtures("fresh_processes")
async def test_sigterm_finishes_the_running_job_and_leaves_with_0(environment: dict[str, str], tmp_path: Path) -> None:
    url = environment["ACESTEP_AMQP_URL"]
    with WorkerProcess(tmp_path, environment) as worker:
        async with Client(url) as client, client.subscribe("job.#", "worker.#") as events:
            task_id = await client.submit({"prompt": "x", **SLOW})
            heard = [await anext(events)]
            while heard[-1].subject != task_id:  # it announces itself a moment after it is ready
                heard.append(await anext(events))
            os.kill(worker.process.id.pid, signal.SIGTERM)
            while not (isinstance(heard[-1], WorkerEvent) and heard[-1].data.state == "stopped"):
                heard.append(await anext(events))
        await eventually(lambda: not worker.process.running())
        assert worker.process.returncode() == 0
    assert any(isinstance(event, JobCompleted) for event in heard)


async def test_a_second_sigterm_leaves_at_once_and_hands_the_message_back(
    environment: dict[str, str], tmp_path: Path
) -> None:
    url = environment["ACESTEP_AMQP_URL"]
    with WorkerProcess(tmp_path, environment) as worker:
        async with Client(url) as client, client.subscribe("job.#") as events:
            await client.submit({"prompt": "x", "audio_duration": 180, "inference_steps": 200})
            await anext(events)
        began = time.monotonic()
        os.kill(worker.process.id.pid, signal.SIGTERM)
        await eventually(lambda: worker.log_lines(event="draining"))
        os.kill(worker.process.id.pid, signal.SIGTERM)
        await eventually(lambda: not worker.process.running())
        assert worker.process.returncode() == 0
        assert time.monotonic() - began < 20
    async with Peer(url) as peer:
        assert (await peer.take("acestep.generate")).redelivered


async def test_prefetch_is_the_worker_count(environment: dict[str, str], tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, environment | {"ACESTEP_QUEUE_WORKERS": "3"}, light=True) as worker:
        async with Peer(environment["ACESTEP_AMQP_URL"]) as peer:
            for number in range(5):
                await peer.submit(task_id=f"song-{number}", prompt=f"until={tmp_path / 'never'}")

            async def held() -> bool:
                return await peer.ready("acestep.generate") == 2

            await until(held, "two ready of five: three should be unacknowledged")
        for _ in range(2):
            os.kill(worker.process.id.pid, signal.SIGTERM)
            await eventually(lambda: worker.log_lines(event="draining"))


def test_a_model_that_is_nowhere_stops_the_start_and_says_where_it_was_looked_for(
    environment: dict[str, str], tmp_path: Path
) -> None:
    code, log = refused_start(environment, tmp_path, ACESTEP_CONFIG_PATH="acestep-v15-nothing")
    assert code == 5
    assert "acestep-v15-nothing" in log


def test_a_wrong_password_stops_the_start_without_showing_it(environment: dict[str, str], tmp_path: Path) -> None:
    url = environment["ACESTEP_AMQP_URL"].replace("guest:guest", "guest:sesame")
    code, log = refused_start(environment, tmp_path, ACESTEP_AMQP_URL=url)
    assert code == 2
    assert "password" in log
    assert "sesame" not in log


def test_a_bucket_that_may_not_be_used_stops_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    code, log = refused_start(environment, tmp_path, AWS_SECRET_ACCESS_KEY="wrong")
    assert code == 2
    assert "AWS_SECRET_ACCESS_KEY" in log


def test_a_language_model_that_is_insisted_on_and_nowhere_stops_the_start(
    environment: dict[str, str], tmp_path: Path
) -> None:
    insisting = {"ACESTEP_INIT_LLM": "true", "ACESTEP_LM_MODEL_PATH": "my-own-lm"}
    code, log = refused_start(environment, tmp_path, **insisting)
    assert code == 5
    assert "my-own-lm is not found" in log


@pytest.mark.parametrize("name", ["ACESTEP_TIER_TABLE", "ACESTEP_SCORE_TABLE"])
def test_a_broken_table_stops_the_start(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    code, log = refused_start(environment, tmp_path, **{name: str(tmp_path / "none.toml")})
    assert code == 2
    assert name in log


@pytest.mark.usefixtures("fresh_processes")
def test_the_consumer_process_never_loads_torch(environment: dict[str, str], tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, environment) as worker:
        maps = Path(f"/proc/{worker.process.id.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "libtorch" in Path(f"/proc/{worker.children()[0]}/maps").read_text()
        assert worker.get("/healthz") == (200, {"status": "alive"})
