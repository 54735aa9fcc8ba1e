# SPDX-License-Identifier: Apache-2.0
"""A fork of the tests' fork server is what a started interpreter would be."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import fork_server
from tests.support.command import run_command
from tests.support.worker import COMMAND, ROOT, clean_environment


@pytest.mark.parametrize("arguments", [["--version"], ["no-such-command"], ["plan", "--vram", "-1"]])
def test_a_forked_command_says_and_returns_the_same_as_a_started_one(arguments: list[str]) -> None:
    forked = run_command(*arguments, variables={})
    with fork_server.not_forking():
        started = run_command(*arguments, variables={})
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_a_fork_is_our_child_in_a_session_of_its_own() -> None:
    command = [*COMMAND, "watch"]
    environment = clean_environment({"ACESTEP_AMQP_URL": "amqp://127.0.0.1:1/"})
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        process.kill()
    assert "libtorch" in maps, "it was started: only the fork server imports this for it"
    assert int(fields[1]) == os.getpid()
    assert int(fields[3]) == process.pid
    assert process.returncode == -9


def test_a_command_whose_libraries_would_read_another_environment_is_started() -> None:
    server = fork_server._server
    assert server is not None
    command = dict.fromkeys(("preexec_fn", "shell", "gids", "gid", "uid", "cwd"))
    rest = {**command, "args": COMMAND, "executable": None, "close_fds": True, "umask": -1, "process_group": -1}
    assert server.fits(rest | {"env": clean_environment({})})
    assert not server.fits(rest | {"env": clean_environment({"HF_HOME": "/elsewhere"})})
