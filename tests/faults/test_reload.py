# SPDX-License-Identifier: Apache-2.0
"""SIGHUP to a worker with running jobs: settings change, the jobs go on, and nothing is delivered again."""

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import GENERATE
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

JOBS = 5
RELOADED, FAILED = "settings reloaded", "settings not reloaded, nothing changed"


@dataclass
class Scenario:
    """A worker that reads a ``.env`` of its own, and eyes on its queue and events."""

    worker: WorkerProcess
    peer: Peer
    recorder: EventRecorder
    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    async def reload(self, event: str, text: str = "", **variables: str) -> dict[str, object]:
        """Write ``.env`` anew, send SIGHUP, and wait for the line of log; that line."""
        self.variables |= variables
        lines = [f"{name}={value}" for name, value in self.variables.items()]
        (self.home / ".env").write_text("\n".join([*lines, text]))
        before = len(self.worker.log_lines(event=event))
        os.kill(self.worker.process.id.pid, signal.SIGHUP)
        await eventually(lambda: len(self.worker.log_lines(event=event)) > before, 60)
        return self.worker.log_lines(event=event)[-1]

    async def waiting(self, count: int) -> None:
        """Wait until so many messages wait in the queue."""

        async def ready() -> bool:
            return await self.peer.ready(GENERATE) == count

        await until(ready, f"{count} messages ready", WITHIN_S)


@pytest.fixture
async def scenario(service_environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Scenario]:
    url = service_environment["ACESTEP_AMQP_URL"]
    settings = service_environment | {"ACESTEP_INPUT_TIMEOUT_S": "30"}
    (tmp_path / ".env").write_text("ACESTEP_QUEUE_WORKERS=1\n")
    worker = WorkerProcess(tmp_path, settings, light=True, home=tmp_path)
    async with running(worker), Peer(url) as peer, EventRecorder(url) as recorder:
        yield Scenario(worker, peer, recorder, tmp_path, {"ACESTEP_QUEUE_WORKERS": "1"})


async def test_the_number_of_workers_follows_at_once_and_running_jobs_are_not_touched(scenario: Scenario) -> None:
    go = scenario.home / "go"
    for number in range(JOBS):
        await scenario.peer.submit(task_id=f"song-{number}", prompt=f"until={go}")
    await scenario.waiting(JOBS - 1)
    changed = await scenario.reload(RELOADED, ACESTEP_QUEUE_WORKERS="3")
    assert changed["changed"] == ["ACESTEP_QUEUE_WORKERS"]
    await scenario.waiting(JOBS - 3)
    await scenario.reload(RELOADED, ACESTEP_QUEUE_WORKERS="auto")
    await scenario.reload(RELOADED, ACESTEP_QUEUE_WORKERS="4", ACESTEP_S3_PRESIGN_SECONDS="600")
    await scenario.waiting(JOBS - 4)
    go.touch()
    await eventually(lambda: sum(event.terminal for event in scenario.recorder.events) == JOBS, WITHIN_S)
    for number in range(JOBS):
        started, *_, end = scenario.recorder.of(f"song-{number}")
        assert (started.state, end.state) == ("started", "completed")
        assert scenario.recorder.states(f"song-{number}").count("started") == 1
        assert "Signature" in end.data["audios"][0]["url"]


async def test_what_bounds_a_job_holds_for_the_next_one(scenario: Scenario) -> None:
    go = scenario.home / "go"
    await scenario.peer.submit(task_id="before", prompt=f"until={go}")
    await eventually(lambda: scenario.recorder.states("before") == ["started"], WITHIN_S)
    await scenario.reload(RELOADED, ACESTEP_EXECUTION_TIMEOUT_S="1", ACESTEP_QUEUE_WORKERS="2")
    await scenario.peer.submit(task_id="after", prompt=f"until={scenario.home / 'never'}")
    await eventually(lambda: scenario.recorder.terminal("after"), WITHIN_S)
    (end,) = scenario.recorder.terminal("after")
    assert end.data["error"]["code"] == "execution_timeout"
    assert scenario.recorder.terminal("before") == []
    await scenario.reload(RELOADED, ACESTEP_INPUT_HOSTS="audio.example", ACESTEP_EXECUTION_TIMEOUT_S="")
    # The host is allowed now; that there is none is another matter.
    url = "https://audio.example:444/a.wav"
    await scenario.peer.submit(task_id="input", reference_audio_path=url)
    await eventually(lambda: scenario.recorder.terminal("input"), WITHIN_S)
    (refused,) = scenario.recorder.terminal("input")
    assert "'audio.example:444' is not in ACESTEP_INPUT_HOSTS" in refused.data["error"]["message"]
    await scenario.reload(RELOADED, ACESTEP_INPUT_HOSTS="audio.example:444")
    await scenario.peer.submit(task_id="allowed", reference_audio_path=url)
    await eventually(lambda: scenario.recorder.terminal("allowed"), WITHIN_S)
    (unreadable,) = scenario.recorder.terminal("allowed")
    assert unreadable.data["error"]["code"] == "input_unreadable"
    go.touch()
    await eventually(lambda: scenario.recorder.terminal("before"), WITHIN_S)
    assert scenario.recorder.terminal("before")[0].state == "completed"


async def test_what_needs_a_restart_is_named_and_the_environment_wins_as_at_the_start(scenario: Scenario) -> None:
    restart = {"ACESTEP_DEVICE": "cpu", "ACESTEP_HTTP_HOST": "127.0.0.2"}
    await scenario.reload(RELOADED, **restart, ACESTEP_S3_PREFIX="elsewhere", ACESTEP_INPUT_TIMEOUT_S="5")
    (told,) = scenario.worker.log_lines(event="needs a restart")
    assert told["settings"] == "ACESTEP_DEVICE, ACESTEP_HTTP_HOST", "the prefix and the time are in the environment"
    assert scenario.worker.log_lines(event=RELOADED)[-1]["changed"] == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ACESTEP_QUEUE_WORKERS=many", "ACESTEP_QUEUE_WORKERS"),
        ("ACESTEP_QUEUE_WORKER=4", "did you mean ACESTEP_QUEUE_WORKERS"),
        ("ACESTEP_INPUT_HOSTS=https://a.example/", "ACESTEP_INPUT_HOSTS"),
        ("this is = not ' a line", "line 2"),
    ],
)
async def test_a_malformed_file_changes_nothing(scenario: Scenario, text: str, named: str) -> None:
    for number in range(JOBS):
        await scenario.peer.submit(task_id=f"song-{number}", prompt=f"until={scenario.home / 'go'}")
    await scenario.waiting(JOBS - 1)
    line = await scenario.reload(FAILED, text, ACESTEP_QUEUE_WORKERS="3")
    assert named in str(line["reason"])
    assert line["level"] == "error"
    assert await scenario.peer.ready(GENERATE) == JOBS - 1
    (scenario.home / "go").touch()
    await eventually(lambda: sum(event.terminal for event in scenario.recorder.events) == JOBS, WITHIN_S)


async def test_the_log_gets_quieter_and_louder(scenario: Scenario) -> None:
    await scenario.reload("needs a restart", ACESTEP_LOG_LEVEL="warning", ACESTEP_DEVICE="cpu")
    assert scenario.worker.log_lines(event=RELOADED) == []
    await scenario.reload(RELOADED, ACESTEP_LOG_LEVEL="info")


async def test_the_log_level_reaches_the_engines_too(scenario: Scenario) -> None:
    await scenario.reload(RELOADED, ACESTEP_LOG_LEVEL="debug")
    await eventually(lambda: scenario.worker.log_lines(event="engine's log level", level="debug"), WITHIN_S)
