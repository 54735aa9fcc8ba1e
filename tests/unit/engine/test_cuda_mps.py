# SPDX-License-Identifier: Apache-2.0
"""The MPS daemon of a worker, with a program in place of NVIDIA's: the real one needs a GPU."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acestep_consumer.config.settings import load
from acestep_consumer.engine import cuda_mps
from acestep_consumer.engine.cuda_mps import MpsDaemon, MpsUnavailable, start_mps
from acestep_consumer.engine.engines import Engines
from acestep_consumer.engine.planner.registry import lm_request
from acestep_consumer.engine.process import EngineProcess
from acestep_consumer.policy.tiers import BUILT_IN
from tests.support.waiting import eventually

CONTROL = """#!/bin/bash
state=$CUDA_MPS_PIPE_DIRECTORY/pid
if [ "$1" = -f ]; then
    echo "${CUDA_VISIBLE_DEVICES-unset}" > "$SEEN"
    echo $$ > "$state"
    exec sleep 600
fi
read -r command
[ -f "$state" ] || exit 1
[ "$command" != quit ] || kill "$(cat "$state")"
"""

START_AND_DIE = """
import asyncio, os
from acestep_consumer.engine import cuda_mps
cuda_mps._CAN_CONNECT = "pass"
async def main():
    await cuda_mps.MpsDaemon().start()
    os._exit(1)
asyncio.run(main())
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the program first on PATH; returns its file. Temporary folders are made in the test's."""
    program = tmp_path / "bin" / cuda_mps.CONTROL
    program.parent.mkdir()
    program.write_text(CONTROL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(cuda_mps.PIPE_DIRECTORY, raising=False)
    monkeypatch.setattr(cuda_mps, "_SYSTEM_SOCKET", tmp_path / "no-daemon")
    monkeypatch.setattr(cuda_mps, "_CAN_CONNECT", "pass")
    return program


@pytest.mark.parametrize(("visible", "seen"), [("1", "unset"), ("GPU-5d4b", "GPU-5d4b")])
async def test_it_runs_until_it_is_stopped_and_numbers_no_gpu_twice(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    daemon = await start_mps(wanted=None)
    assert daemon is not None
    folder = Path(daemon.environment[cuda_mps.PIPE_DIRECTORY])
    pid = int(text_of(folder / "pid"))
    assert text_of(tmp_path / "seen") == seen
    assert is_running(pid)
    await daemon.stop()
    assert not is_running(pid)
    assert os.fspath(folder) not in folders_in(tmp_path)


async def test_it_ends_with_a_worker_that_is_killed(control: Path, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", START_AND_DIE)
    assert await process.wait() == 1
    (folder,) = folders_in(tmp_path)
    await eventually(lambda: not is_running(int(text_of(Path(folder, "pid")))))
    await MpsDaemon().stop()
    assert not folders_in(tmp_path)


async def test_what_does_not_work_is_left_out_unless_it_is_required(
    control: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_mps, "_CAN_CONNECT", "raise SystemExit(1)")
    assert await start_mps(wanted=None) is None
    change(control, "#!/bin/bash\nexit 3\n")
    with pytest.raises(MpsUnavailable, match="ended with status 3"):
        await start_mps(wanted=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await start_mps(wanted=None) is None
    with pytest.raises(MpsUnavailable, match="is not installed"):
        await start_mps(wanted=True)
    assert not folders_in(tmp_path)


async def test_a_daemon_of_the_operator_is_used(control: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cuda_mps.PIPE_DIRECTORY, str(tmp_path))
    assert await start_mps(wanted=True) is None
    monkeypatch.delenv(cuda_mps.PIPE_DIRECTORY)
    monkeypatch.setattr(cuda_mps, "_SYSTEM_SOCKET", control)
    assert await start_mps(wanted=True) is None


async def test_a_daemon_that_never_answers_is_ended(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(control, CONTROL.replace('echo $$ > "$state"\n', ""))
    monkeypatch.setattr(cuda_mps, "_WITHIN_S", 0.5)
    daemon = MpsDaemon()
    with pytest.raises(MpsUnavailable, match="did not answer"):
        await daemon.start()
    monkeypatch.setattr(cuda_mps, "_END_S", 0.5)
    await daemon.stop()
    assert daemon._process is not None
    assert daemon._process.returncode is not None


@pytest.mark.parametrize(
    ("variables", "starts"),
    [
        ({}, True),
        ({"ACESTEP_CUDA_MPS": "false"}, False),
        ({"ACESTEP_INIT_LLM": "false"}, False),
        ({"ACESTEP_LM_DEVICE": "cpu"}, False),
        ({"ACESTEP_DEVICE": "cpu"}, False),
    ],
    ids=str,
)
async def test_the_renderer_gets_a_daemon_where_two_engines_may_share_a_gpu(
    control: Path, tmp_path: Path, variables: dict[str, str], *, starts: bool
) -> None:
    settings = load(variables, env_file=None)
    engines = Engines(settings, BUILT_IN, log_json=True)
    await engines._start_mps(lm_request(settings.engine, {}))
    given = [value for name, value in engines._renderer.environment.items() if name == cuda_mps.PIPE_DIRECTORY]
    assert given == folders_in(tmp_path)
    assert len(given) == starts
    await engines.stop()
    assert not folders_in(tmp_path)


async def test_a_process_has_the_daemons_variables_beside_the_inherited_ones() -> None:
    process = await EngineProcess.start("tests.support.light_engine", {cuda_mps.PIPE_DIRECTORY: "/run/mps"})
    try:
        await eventually(lambda: b"light_engine" in bytes_of(f"/proc/{process.pid}/cmdline"))
        found = bytes_of(f"/proc/{process.pid}/environ").split(b"\0")
    finally:
        await process.end()
    assert {b"CUDA_MPS_PIPE_DIRECTORY=/run/mps", f"PATH={os.environ['PATH']}".encode()} <= {*found}


def bytes_of(file: str) -> bytes:
    """Return what is in a file."""
    return Path(file).read_bytes()


def is_running(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.returncode == 0 and not found.stdout.startswith("Z")


def text_of(file: Path) -> str:
    """Return a file's text."""
    return file.read_text().strip()


def change(program: Path, text: str) -> None:
    """Replace the program."""
    program.write_text(text)


def folders_in(folder: Path) -> list[str]:
    """Return the daemons' folders."""
    return [os.fspath(found) for found in folder.glob("acestep-mps-*")]
