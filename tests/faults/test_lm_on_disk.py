# SPDX-License-Identifier: Apache-2.0
"""A large GPU with one small language model on its disk: it is used, and the start, ``doctor`` and ``plan`` say so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.config.exit_codes import Exit
from tests.support.broker import Peer
from tests.support.command import run_command
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

SMALL, LARGE = "acestep-5Hz-lm-0.6B", "acestep-5Hz-lm-4B"
USED = f"{SMALL} is used: {LARGE} would suit this GPU better, but is not on the disk"


@pytest.fixture
def environment(own_worker_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A worker on what it takes for a GPU of 80 GB, with the models of its checkpoint folder and no others."""
    return own_worker_environment | {
        "ACESTEP_CONFIG_PATH2": "",
        "ACESTEP_INIT_LLM": "auto",
        "ACESTEP_LM_BACKEND": "pt",
        "ACESTEP_DEVICE": "cpu",
        "MAX_CUDA_VRAM": "80",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "empty"),
    }


async def test_the_small_one_serves_jobs_that_think(environment: dict[str, str], tmp_path: Path) -> None:
    async with (
        running(WorkerProcess(tmp_path, environment)) as worker,
        EventRecorder(environment["ACESTEP_AMQP_URL"]) as recorder,
        Peer(environment["ACESTEP_AMQP_URL"]) as peer,
    ):
        assert [line["note"] for line in worker.log_lines(event="engine warning") if SMALL in line["note"]] == [USED]
        await peer.submit(task_id="thinks", thinking=True, audio_duration=10, inference_steps=1)
        await eventually(lambda: recorder.terminal("thinks"), 120)
    (end,) = recorder.terminal("thinks")
    assert end.state == "completed", end.data
    assert end.data["lm"] == {"model": SMALL, "backend": "pt"}


def test_doctor_and_plan_say_the_same(environment: dict[str, str]) -> None:
    plan = json.loads(run_command("plan", "--json", variables=environment).stdout)
    assert plan["lm"]["model"] == SMALL
    assert USED in plan["notes"]
    findings = json.loads(run_command("doctor", "--json", variables=environment).stdout)
    about = [said for check, level, said in flattened(findings) if check == "language model"]
    assert about[0] == USED
    assert about[1].endswith(f"{SMALL} is complete")


def flattened(report: Any) -> list[tuple[str, str, str]]:
    """Check, level and text of each finding, wherever in the report it is."""
    if isinstance(report, list):
        return [found for each in report for found in flattened(each)]
    if isinstance(report, dict) and "check" in report:
        return [(report["check"], report["level"], report["said"])]
    return flattened(list(report.values())) if isinstance(report, dict) else []


def test_a_start_that_needs_one_says_which_are_missing(environment: dict[str, str], tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(
        Path(environment["ACESTEP_CHECKPOINT_DIR"]) / "acestep-v15-turbo", checkpoints / "acestep-v15-turbo"
    )
    variables = environment | {"ACESTEP_CHECKPOINT_DIR": str(checkpoints), "ACESTEP_INIT_LLM": "true"}
    done = run_command("run", variables=variables | {"ACESTEP_HTTP_PORT": "0"})
    assert done.returncode == Exit.ENGINE
    (line,) = [line for line in done.stderr.splitlines() if "engine cannot start" in line]
    assert f"ACE-Step/{LARGE} is not on the disk and cannot be downloaded" in line
    assert f"(acestep-consumer models pull {LARGE} --checkpoints {checkpoints})" in line
    assert "Traceback" not in done.stderr
