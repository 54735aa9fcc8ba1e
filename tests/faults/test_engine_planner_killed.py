# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the planner in the middle of plans: they are written again, and the renderer goes on as if nothing was."""

from pathlib import Path

from tests.support.broker import Peer
from tests.support.engines import ONE_MODEL, THINKING, at_work, ends, pid_of, signal_engine, state_of
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

SONG = {"use_cot_caption": False, "use_cot_language": False}


async def test_plans_are_written_by_the_next_planner_and_songs_are_not_disturbed(
    own_worker_environment: dict[str, str], tmp_path: Path
) -> None:
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    settings = {**ONE_MODEL, **THINKING, "ACESTEP_QUEUE_WORKERS": "3", "ACESTEP_MAX_ATTEMPTS": "2"}
    worker = WorkerProcess(tmp_path, own_worker_environment | settings)
    names = ["sung", "thought-1", "thought-2"]
    async with running(worker), EventRecorder(url) as recorder, Peer(url) as peer:
        renderer = pid_of(worker, "renderer")
        await peer.submit(task_id="sung", audio_duration=60, inference_steps=40, **SONG)
        for name in names[1:]:
            await peer.submit(task_id=name, thinking=True, audio_duration=20, inference_steps=1, **SONG)
        await eventually(lambda: at_work(recorder, "plan"), WITHIN_S)
        killed = signal_engine(worker, "planner")
        await eventually(lambda: all(recorder.terminal(name) for name in names), WITHIN_S)
        await eventually(lambda: worker.get("/readyz")[0] == 200, WITHIN_S)
        assert state_of(worker, "planner") == {"ready": True, "restarts": 1}
        assert state_of(worker, "renderer") == {"ready": True, "restarts": 0}
        assert pid_of(worker, "renderer") == renderer
        assert pid_of(worker, "planner") != killed
    assert ends(recorder, names) == {name: ["completed"] for name in names}
