# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while the command line or the worker is being loaded."""

import signal
import subprocess
import sys

import pytest

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
