# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the renderer in the middle of songs: they are rendered again, each is told of once, health recovers."""

from pathlib import Path

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from tests.support.broker import Peer, broker_settings
from tests.support.engines import ONE_MODEL, at_work, ends, signal_engine, state_of
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

SONG = {"audio_duration": 20, "inference_steps": 40}
SONGS, KILLS = 4, 2


async def test_songs_go_on_in_the_next_renderer(own_worker_environment: dict[str, str], tmp_path: Path) -> None:
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    settings = {**ONE_MODEL, "ACESTEP_QUEUE_WORKERS": "3", "ACESTEP_MAX_ATTEMPTS": str(KILLS + 1)}
    worker = WorkerProcess(tmp_path, own_worker_environment | settings)
    names = [f"song-{number}" for number in range(SONGS)]
    async with BrokerConnection(broker_settings(url), "declares"):
        pass
    async with EventRecorder(url) as recorder, Peer(url) as peer:
        async with running(worker):
            assert state_of(worker, "renderer") == {"ready": True, "restarts": 0}
            for name in names:
                await peer.submit(task_id=name, **SONG)
            for kills in range(1, KILLS + 1):
                # What the last one did may still be told until then.
                await eventually(lambda: state_of(worker, "renderer").get("ready"), WITHIN_S)
                before = len(recorder.events)
                await eventually(lambda since=before: at_work(recorder, "render", since), WITHIN_S)  # type: ignore[misc]  # mypy knows no default here
                signal_engine(worker, "renderer")
                await eventually(lambda: len(worker.log_lines(event="engine restarts")) == kills, WITHIN_S)  # noqa: B023 - used in this round
            await eventually(lambda: all(recorder.terminal(name) for name in names), WITHIN_S)
            await eventually(lambda: worker.get("/readyz")[0] == 200, WITHIN_S)
            assert state_of(worker, "renderer") == {"ready": True, "restarts": KILLS}
        assert await peer.ready(GENERATE) == 0
        assert await peer.ready(DEAD_LETTER) == 0
    assert ends(recorder, names) == {name: ["completed"] for name in names}
