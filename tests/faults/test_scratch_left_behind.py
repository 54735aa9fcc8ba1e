# SPDX-License-Identifier: Apache-2.0
"""A worker that is killed leaves its work files behind; the next one removes them, and nobody else's."""

from pathlib import Path

from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


def roots(scratch: Path) -> set[Path]:
    return set(scratch.glob("acestep-*"))


async def test_the_next_worker_removes_what_a_killed_one_left_and_each_job_its_own(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url, go = service_environment["ACESTEP_AMQP_URL"], tmp_path / "go"
    scratch = tmp_path / "scratch"
    settings = service_environment | {"ACESTEP_SCRATCH_DIR": str(scratch)}
    folders = {name: tmp_path / name for name in ("doomed", "living", "next")}
    for folder in folders.values():
        folder.mkdir()
    foreign = scratch / "acestep-notes"
    foreign.mkdir(parents=True)
    (foreign / "diary.txt").write_text("mine")
    async with (
        running(WorkerProcess(folders["doomed"], settings, light=True)) as doomed,
        running(WorkerProcess(folders["living"], settings, light=True)),
        Peer(url) as peer,
        EventRecorder(url) as recorder,
    ):
        for number in range(2):  # a worker holds one
            await peer.submit(task_id=f"song-{number}", prompt=f"until={go}")
        await eventually(lambda: sum(event.state == "started" for event in recorder.events) == 2, WITHIN_S)
        # A job is announced before it has its folder.
        await eventually(lambda: len(list(scratch.glob("acestep-*/song-*"))) == 2)
        before = roots(scratch) - {foreign}
        assert len(before) == 2
        doomed.kill()
        async with running(WorkerProcess(folders["next"], settings, light=True)) as heir:
            (gone,) = before - roots(scratch)
            assert heir.log_lines(event="scratch folder of a worker that was killed is removed", folder=str(gone)), (
                "and that of the living worker stays"
            )
            assert (foreign / "diary.txt").read_text() == "mine"
            go.touch()
            await eventually(lambda: sum(event.terminal for event in recorder.events) == 2, WITHIN_S)
            await eventually(lambda: not any(scratch.glob("acestep-*/song-*")))
    assert {event.state for event in recorder.events if event.terminal} == {"completed"}
    assert roots(scratch) == {foreign}
