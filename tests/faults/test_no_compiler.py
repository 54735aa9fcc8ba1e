# SPDX-License-Identifier: Apache-2.0
"""A host without a compiler, as slim images are: the models run uncompiled, and nothing dies of it."""

from pathlib import Path

from acestep_consumer.client import Client
from tests.support.command import run_command
from tests.support.engines import ONE_MODEL, state_of
from tests.support.worker import WorkerProcess, running

# Compiling is on by default on GPUs alone; on a CPU it takes C++.
WITHOUT = {"ACESTEP_COMPILE": "true", "CXX": "/nonexistent/compiler"}
SONG = {"prompt": "x", "audio_duration": 10, "inference_steps": 1, "audio_format": "wav"}


async def test_a_worker_without_a_compiler_renders_uncompiled_after_one_warning(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    worker = WorkerProcess(tmp_path, own_worker_environment | ONE_MODEL | WITHOUT)
    async with running(worker), Client(own_worker_environment["ACESTEP_AMQP_URL"]) as client:
        job = await client.start(SONG)
        assert (await job.wait(120)).state == "completed"
        assert state_of(worker, "renderer") == {"ready": True, "restarts": 0}
        warnings = [line for line in worker.log_lines(level="warning") if "uncompiled" in line.get("note", "")]
    (warning,) = warnings
    assert "CXX = /nonexistent/compiler is not there" in warning["note"]


def test_doctor_says_so(own_worker_environment: dict[str, str]) -> None:
    done = run_command("doctor", variables={**own_worker_environment, **WITHOUT, "ACESTEP_HTTP_PORT": "0"})
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warn  compiler")]
    assert "uncompiled" in line
    assert "apt-get install g++ python3-dev, or ACESTEP_COMPILE=false" in done.stdout
