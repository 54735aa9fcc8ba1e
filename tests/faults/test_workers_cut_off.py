# SPDX-License-Identifier: Apache-2.0
"""Workers lose their broker with a job running, one after the other: they live, so the job is not blamed."""

from contextlib import AsyncExitStack
from pathlib import Path

from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.proxy import Proxy
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

NAMES = ("a", "b", "c")


def starts(recorder: EventRecorder) -> list[str]:
    """Who began the job, in order."""
    return [event.data["worker_id"] for event in recorder.of("song") if event.state == "started"]


async def test_a_job_outlasts_more_lost_connections_than_it_has_tries(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url, go = service_environment["ACESTEP_AMQP_URL"], tmp_path / "go"
    async with AsyncExitStack() as stack:
        ways: dict[str, Proxy] = {}
        for name in NAMES:
            ways[name] = await stack.enter_async_context(Proxy.for_url(url))
            own = {"ACESTEP_WORKER_ID": name, "ACESTEP_AMQP_URL": ways[name].url(url), "ACESTEP_MAX_ATTEMPTS": "2"}
            (tmp_path / name).mkdir()
            worker = WorkerProcess(tmp_path / name, service_environment | own, light=True)
            await stack.enter_async_context(running(worker))
        recorder = await stack.enter_async_context(EventRecorder(url))
        peer = await stack.enter_async_context(Peer(url))
        await peer.submit(task_id="song", prompt=f"until={go}")
        for number in range(1, len(NAMES) + 1):
            await eventually(lambda: len(starts(recorder)) == number or recorder.terminal("song"), WITHIN_S)  # noqa: B023 - awaited at once
            assert recorder.terminal("song") == []
            if number < len(NAMES):
                # For good: it cannot say over a new connection what became of the old one.
                ways[starts(recorder)[-1]].refuse()
        assert sorted(starts(recorder)) == list(NAMES)
        go.touch()
        await eventually(lambda: recorder.terminal("song"), WITHIN_S)
        for way in ways.values():
            way.heal()
    assert {event.state for event in recorder.terminal("song")} == {"completed"}
