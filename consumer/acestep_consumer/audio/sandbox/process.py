# SPDX-License-Identifier: Apache-2.0
"""Our side of a decoder process: start it with two files and nothing else, wait, and end it when nobody waits."""

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

import av
import structlog

from acestep_consumer.audio.sandbox.verdict import DecodeExit
from acestep_consumer.domain.errors import Cancelled

CPU_S: Final = 60
"""Ten minutes of sound take about two."""
WALL_S: Final = 180
MEMORY_BYTES: Final = 1 << 30

_POLL_MS: Final = 100
_SAID_BYTES: Final = 1_000
_OUT_OF_TIME: Final = frozenset({-signal.SIGXCPU, -signal.SIGALRM})
# ``-I``: neither the environment nor the working folder adds to what is imported. So it is told where this package and
# PyAV are, which are the same folder once they are installed.
_PROGRAM: Final = """\
import sys
sys.path += sys.argv.pop().split("\\n")
from acestep_consumer.audio.sandbox.__main__ import main
main()
"""
_FOLDERS: Final = "\n".join({str(Path(file).parents[depth]) for file, depth in ((__file__, 3), (av.__file__ or "", 1))})

log = structlog.get_logger()


class DecoderTookTooLong(Exception):
    """The process was ended at its limit of time."""


class DecoderDied(Exception):
    """The process ended in a way that is none of its verdicts."""


def decode_into(
    target: BinaryIO, source: BinaryIO, *, sample_rate: int, most_samples: int, stopped: Callable[[], bool]
) -> DecodeExit:
    """Decode the audio file ``source`` as stereo float32 samples into ``target``, both of them open files.

    ``stopped`` is asked ten times a second whether the job still wants it. Only ``DecodeExit.STEREO`` leaves usable
    samples, at most ``most_samples`` a channel.

    Raises:
        Cancelled: ``stopped`` said so.
        DecoderTookTooLong: at 60 seconds of CPU time, or 180 on the clock.
        DecoderDied: it crashed, or was killed.
        OSError: it could not be started.
    """
    numbers = map(str, (sample_rate, most_samples, CPU_S, WALL_S, MEMORY_BYTES))
    command = [sys.executable, "-I", "-c", _PROGRAM, *numbers, _FOLDERS]
    with subprocess.Popen(  # noqa: S603 - a command of our own
        command, stdin=source, stdout=target, stderr=subprocess.PIPE, env=_environment(), cwd="/"
    ) as child:
        try:
            said = _listen(child, stopped)
        finally:
            child.kill()
    return _judge(child.returncode, said)


def _environment() -> dict[str, str]:
    """What a process needs to start at all: no settings, no keys."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {"LC_ALL": "C.UTF-8"}


def _listen(child: "subprocess.Popen[bytes]", stopped: Callable[[], bool]) -> str:
    """Wait until the child is gone; return the end of what it said, which only a broken one does."""
    assert child.stderr is not None  # noqa: S101 - it is a pipe
    voice, said, deadline = child.stderr.fileno(), b"", time.monotonic() + WALL_S
    ear = select.poll()
    ear.register(voice, select.POLLIN)
    while True:
        if ear.poll(_POLL_MS):
            if not (words := os.read(voice, 1 << 16)):
                break
            said = (said + words)[-_SAID_BYTES:]
        if stopped():
            raise Cancelled
        if time.monotonic() > deadline:
            raise DecoderTookTooLong
    # Its end of the pipe closes as it ends: it needs no more than a moment, unless it closed it itself.
    with suppress(subprocess.TimeoutExpired):
        child.wait(1)
    return said.decode(errors="replace")


def _judge(code: int, said: str) -> DecodeExit:
    if code in _OUT_OF_TIME:
        raise DecoderTookTooLong
    try:
        return DecodeExit(code)
    except ValueError as error:
        log.warning("decoder died", exit_code=code, said=said)
        raise DecoderDied(f"exit code {code}") from error
