# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while the command line or the worker is being loaded."""

import signal
import subprocess
import sys

import pytest

from tests.support.waiting import WITHIN_S

INTERRUPTED_WHILE_LOADING = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "acestep_consumer.cli":
            os.kill(os.getpid(), signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_BLOCK, ())  # a call in which a pending signal takes effect

sys.meta_path.insert(0, Finder)
{ignore}
from acestep_consumer.__main__ import main
sys.argv = ["acestep-consumer", "--help"]
main()
"""


def interrupted(*, ignored: bool) -> subprocess.CompletedProcess[str]:
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignored else ""
    code = INTERRUPTED_WHILE_LOADING.format(ignore=ignore)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_it_ends_the_process_without_a_word() -> None:
    done = interrupted(ignored=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_where_it_is_ignored_it_stays_so() -> None:
    done = interrupted(ignored=True)
    assert done.returncode == 0
    assert "Usage" in done.stdout


SIGNALLED_WHILE_STARTING = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "acestep_consumer.app":
            os.kill(os.getpid(), signal.{name})
            signal.pthread_sigmask(signal.SIG_BLOCK, ())  # a call in which a pending signal takes effect

sys.meta_path.insert(0, Finder)
from acestep_consumer.__main__ import main
sys.argv = ["acestep-consumer", "run"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_still_being_loaded_ends_with_0(number: signal.Signals) -> None:
    code = SIGNALLED_WHILE_STARTING.format(name=number.name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def in_a_shell(line: str) -> "subprocess.CompletedProcess[str]":
    command = f'set -o pipefail; acestep() {{ {sys.executable} -m acestep_consumer "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=WITHIN_S)


@pytest.mark.parametrize("command", ["--help", "topology", "schema events", "plan --vram 8", "models list"])
def test_a_reader_that_has_gone_is_no_job_that_failed(command: str) -> None:
    done = in_a_shell(f"acestep {command} | true")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", ["--help", "topology", "schema events", "plan --vram 8", "models list"])
def test_an_output_on_a_full_disk_is_no_bug(command: str) -> None:
    done = in_a_shell(f"acestep {command} >/dev/full")
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["--help", "topology", "schema events", "plan --vram 8"])
def test_a_command_works_with_closed_streams(command: str, closed: str) -> None:
    done = in_a_shell(f"acestep {command} {closed}")
    assert (done.returncode, done.stderr) == (0, "")


def test_programs_that_a_command_starts_have_its_streams_too() -> None:
    code = (
        "import subprocess; from acestep_consumer.commands.base import open_missing_streams; open_missing_streams(); "
        "raise SystemExit(subprocess.run(['test', '-e', '/dev/fd/1'], close_fds=True).returncode)"
    )
    done = in_a_shell(f'"{sys.executable}" -c "{code}" >&-')
    assert (done.returncode, done.stderr) == (0, "")


CLEANS_UP = """
import asyncio, os, signal
from acestep_consumer.commands.base import run_to_end

async def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)
        print("cleaned up", flush=True)

try:
    run_to_end(command())
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_second_ctrl_c_at_once_does_not_break_into_the_end_of_a_command() -> None:
    done = subprocess.run([sys.executable, "-c", CLEANS_UP], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\ninterrupted\n", "")


def test_a_second_ctrl_c_after_a_while_ends_a_command_that_does_not_come_to_its_end() -> None:
    code = CLEANS_UP.replace("asyncio.sleep(0.05)", "asyncio.sleep(1.5); os.kill(os.getpid(), signal.SIGINT)").replace(
        'print("cleaned up", flush=True)', "await asyncio.Event().wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
