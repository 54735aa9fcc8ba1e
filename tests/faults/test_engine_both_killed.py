# SPDX-License-Identifier: Apache-2.0
"""kill -9 of planner and renderer together, again and again: every job is done once, and the worker gets well."""

from pathlib import Path

from tests.support.broker import Peer
from tests.support.engines import ONE_MODEL, THINKING, ends, signal_engine, state_of
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

ROUNDS = 2
SONG = {"audio_duration": 10, "inference_steps": 40, "use_cot_caption": False, "use_cot_language": False}
ENGINES = ("planner", "renderer")


async def test_nothing_is_lost_and_nothing_is_told_twice(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    settings = {**ONE_MODEL, **THINKING, "ACESTEP_QUEUE_WORKERS": "6", "ACESTEP_MAX_ATTEMPTS": str(ROUNDS + 1)}
    worker = WorkerProcess(tmp_path, own_worker_environment | settings)
    names = [f"{kind}-{number}" for kind in ("thought", "sung") for number in range(3)]
    async with running(worker), EventRecorder(url) as recorder, Peer(url) as peer:
        for name in names:
            await peer.submit(task_id=name, thinking=name.startswith("thought"), **SONG)
        await eventually(lambda: any(event.state == "progress" for event in recorder.events), WITHIN_S)
        for kills in range(1, ROUNDS + 1):
            for engine in ENGINES:
                signal_engine(worker, engine)
            well = {"ready": True, "restarts": kills}
            await eventually(lambda: all(state_of(worker, engine) == well for engine in ENGINES), WITHIN_S)  # noqa: B023 - used in this round
        await eventually(lambda: all(recorder.terminal(name) for name in names), WITHIN_S)
        assert worker.get("/readyz")[0] == 200
    assert ends(recorder, names) == {name: ["completed"] for name in names}
