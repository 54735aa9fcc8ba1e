# SPDX-License-Identifier: Apache-2.0
"""Parent's side of a decoder process: starts it with two files and nothing else, waits, kills it when cancelled."""

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from acestep_consumer.audio.sandbox.exit_codes import DecodeExit
from acestep_consumer.domain.errors import Cancelled

CPU_S: Final = 60
"""Ten minutes of audio take about two."""
WALL_S: Final = 180
MEMORY_BYTES: Final = 1 << 30

_POLL_MS: Final = 100
_STDERR_BYTES: Final = 1_000
_OUT_OF_TIME: Final = frozenset({-signal.SIGXCPU, -signal.SIGALRM})
# ``-I``: neither the environment nor the working directory adds to the import path. So the child gets the folders of
# this package and of PyAV as an argument; they are the same one once both are installed.
_PROGRAM: Final = """\
import sys
sys.path += sys.argv.pop().split("\\n")
from acestep_consumer.audio.sandbox.__main__ import main
main()
"""


def _folder_of(package: str) -> str:
    """Return the folder that a package is imported from, without importing it: only the child needs FFmpeg."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return str(Path(found.origin).parents[1])


_FOLDERS: Final = "\n".join({str(Path(__file__).parents[3]), _folder_of("av")})

log = structlog.get_logger()


class DecoderTookTooLong(Exception):
    """The process was killed at its time limit."""


class DecoderDied(Exception):
    """The process ended with an exit code that is none of ``DecodeExit``."""


def decode_into(
    target: BinaryIO, source: BinaryIO, *, sample_rate: int, max_samples: int, stopped: Callable[[], bool]
) -> DecodeExit:
    """Decode the audio file ``source`` as stereo float32 samples into ``target``, both of them open files.

    ``stopped`` is polled ten times a second. The samples are usable after ``DecodeExit.STEREO`` only; they are at most
    ``max_samples`` per channel.

    Raises:
        Cancelled: ``stopped`` returned True.
        DecoderTookTooLong: at 60 seconds of CPU time, or 180 on the clock.
        DecoderDied: it crashed, or was killed.
        OSError: it could not be started.
    """
    numbers = map(str, (sample_rate, max_samples, CPU_S, WALL_S, MEMORY_BYTES))
    command = [sys.executable, "-I", "-c", _PROGRAM, *numbers, _FOLDERS]
    with subprocess.Popen(  # noqa: S603 - a command of our own
        command, stdin=source, stdout=target, stderr=subprocess.PIPE, env=_environment(), cwd="/"
    ) as child:
        try:
            stderr = _wait(child, stopped)
        finally:
            child.kill()
    return _result(child.returncode, stderr)


def _environment() -> dict[str, str]:
    """The variables that a process needs to start: no settings, no keys."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {"LC_ALL": "C.UTF-8"}


def _wait(child: "subprocess.Popen[bytes]", stopped: Callable[[], bool]) -> str:
    """Wait until the child ends; return the end of its stderr, which is empty unless it crashed."""
    if child.stderr is None:
        raise ValueError("the decoder's stderr must be a pipe")
    pipe, stderr, deadline = child.stderr.fileno(), b"", time.monotonic() + WALL_S
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        if poll.poll(_POLL_MS):
            if not (chunk := os.read(pipe, 1 << 16)):
                break
            stderr = (stderr + chunk)[-_STDERR_BYTES:]
        if stopped():
            raise Cancelled
        if time.monotonic() > deadline:
            raise DecoderTookTooLong
    # The pipe closes when the child ends, so that it needs no more than a moment, unless it closed the pipe itself.
    with suppress(subprocess.TimeoutExpired):
        child.wait(1)
    return stderr.decode(errors="replace")


def _result(code: int, stderr: str) -> DecodeExit:
    if code in _OUT_OF_TIME:
        raise DecoderTookTooLong
    try:
        return DecodeExit(code)
    except ValueError as error:
        log.warning("decoder died", exit_code=code, stderr=stderr)
        raise DecoderDied(f"exit code {code}") from error
