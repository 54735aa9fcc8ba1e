# SPDX-License-Identifier: Apache-2.0
"""Pool of encoder processes: each encodes, measures or aligns one song at a time, which it gets in shared memory.

An encoder that crashes takes no other song with it, and its own song is given to another one. The shared memory has no
name: it is freed with the last process that has it open, however those end.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import structlog
from numpy.typing import NDArray

from acestep_consumer.audio.codec import Encode, Samples, encode_with
from acestep_consumer.audio.formats import Format
from acestep_consumer.audio.levels import Levels
from acestep_consumer.audio.time_warping import Matrix, Warp, WarpedLyrics
from acestep_consumer.concurrency.slots import RankedSlots
from acestep_consumer.domain.errors import Cancelled, RenderFailed

Stopped = Callable[[], bool]
Measure = Callable[[Samples, int], dict[str, float] | None]
"""``audio.measures.measures_of``, in whatever process."""

TRIES: Final = 2
"""Encoders that may die of a song before its job fails."""

MOST_THREADS: Final = 4
"""Threads for one FLAC file, where no other song needs their cores. With more, its MD5 takes longer than encoding."""

_SLOTS_A_SPARE = 4
"""One slot in so many may be an additional thread of a song: all its threads take half as much time again as one."""

LONGEST_S: Final = 600.0
"""Time after which an encoder counts as hung. The slowest format takes 16 seconds for a song of 300 on an idle core."""

_COMMAND: Final = (sys.executable, "-m", "acestep_consumer.audio.encoding")
_POLL_MS = 200
_WAIT_S = 1.0
_ANSWER_BYTES = 1 << 16

log = structlog.get_logger()


class EncoderDied(Exception):
    """The process ended without an answer, or was killed for taking too long."""


class EncoderPool:
    """Encodes songs in at most ``size`` processes, which run until ``close``. Any thread may use it.

    They also end when this process does, even if it is killed.
    """

    def __init__(self, size: int, command: Sequence[str] = _COMMAND) -> None:
        self.size = size
        self._command = command
        self._slots = RankedSlots(size)
        self._spare = RankedSlots(size // _SLOTS_A_SPARE)
        self._lock = threading.Lock()
        self._idle: list[_EncoderProcess] = []

    def start(self) -> None:
        """Start all processes, without waiting for them: later no song waits for one to start."""
        self._idle += [_EncoderProcess(self._command) for _ in range(self.size)]

    @property
    def idle_pids(self) -> list[int]:
        """Process ids of the encoders that encode nothing."""
        with self._lock:
            return [process.pid for process in self._idle]

    def close(self) -> None:
        """End the processes that encode nothing."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    @contextmanager
    def slot(self, stopped: Stopped, rank: float = 0.0) -> Iterator[Encode]:
        """Wait for an encoder, and yield the function that encodes with it, as ``audio.codec.encode`` does.

        Of the jobs that wait, those of a lower ``rank`` go first. A job waits before its samples are copied, so that
        shared memory holds as many songs as there are encoders.

        Raises:
            Cancelled: ``stopped``, polled here and in the function, returned true.
        """
        with self._slots.held(rank, lambda: raise_if(stopped)):
            yield lambda samples, stem, audio_format, sample_rate: encode_with(
                lambda *song: self._write(stopped, *song), samples, stem, audio_format, sample_rate
            )

    @contextmanager
    def measurer(self, stopped: Stopped, rank: float = 0.0) -> Iterator[Measure]:
        """Wait for an encoder, and yield the function that measures with it, as ``audio.measures.measures_of`` does.

        Raises likewise; the function raises ``RenderFailed`` as well.
        """
        with self._slots.held(rank, lambda: raise_if(stopped)):
            yield lambda samples, sample_rate: self._measure(stopped, samples, sample_rate)

    @contextmanager
    def warper(self, stopped: Stopped, rank: float = 0.0) -> Iterator[Warp]:
        """Wait for an encoder, and yield the function that aligns lyrics with it, as ``time_warping.warped`` does.

        Raises likewise.
        """
        with self._slots.held(rank, lambda: raise_if(stopped)):
            yield lambda matrices, sung: self._warp(stopped, matrices, sung)

    @contextmanager
    def _spare_slots(self, wanted: Format) -> Iterator[int]:
        """Take slots for additional threads of one song, where nobody has them; yields how many."""
        with ExitStack() as taken:
            spare = 0
            while wanted.codec == "flac" and spare < MOST_THREADS - 1 and self._take_spare(taken):
                spare += 1
            yield spare

    def _take_spare(self, taken: ExitStack) -> bool:
        with ExitStack() as both:
            for slots in (self._spare, self._slots):
                if (slot := slots.enter_now()) is None:
                    return False
                both.callback(slots.leave, slot)
            taken.push(both.pop_all())
        return True

    def _write(self, stopped: Stopped, samples: Samples, path: Path, wanted: Format, sample_rate: int) -> Levels | None:
        request = _request(samples, sample_rate) | {"path": str(path), "format": asdict(wanted)}
        with _SharedSamples(samples) as shared, self._spare_slots(wanted) as spare:
            try:
                answer = self._ask(request | {"threads": 1 + spare}, shared.number, stopped)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        _raise_failure(answer)
        found = answer["levels"]
        return Levels(**found) if found else None

    def _measure(self, stopped: Stopped, samples: Samples, sample_rate: int) -> dict[str, float] | None:
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        with _SharedSamples(samples) as shared:
            answer = self._ask(_request(samples, sample_rate), shared.number, stopped)
        _raise_failure(answer)
        measures: dict[str, float] | None = answer["measures"]
        return measures

    def _warp(self, stopped: Stopped, matrices: Matrix, sung: NDArray[np.bool_]) -> WarpedLyrics:
        matrices = np.ascontiguousarray(matrices, dtype=np.float32)
        with _SharedSamples(matrices) as shared:
            answer = self._ask({"shape": matrices.shape, "sung": sung.tolist()}, shared.number, stopped)
        _raise_failure(answer)
        return WarpedLyrics([(first, last) for first, last in answer["frames"]], answer["score"])

    def _ask(self, request: dict[str, Any], samples: int, stopped: Stopped) -> dict[str, Any]:
        """Have one song encoded, measured or aligned, by another process if the first one dies."""
        tries = 0
        while True:
            process = self._take()
            try:
                answer = process.ask(request, samples, stopped)
            except EncoderDied as death:
                tries += 1
                log.warning("encoder process died", reason=str(death), tries=tries)
                if tries == TRIES:
                    suffix = request["format"]["suffix"][1:] + " " if "format" in request else ""
                    raise RenderFailed(f"the {suffix}encoder crashed on this song") from death
            else:
                with self._lock:
                    self._idle.append(process)
                return answer

    def _take(self) -> "_EncoderProcess":
        """Return an idle process, else a new one. There are never more than slots."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                process.end()
        return _EncoderProcess(self._command)


class _SharedSamples:
    """A copy of samples in memory that is shared by its file descriptor, ``number``. A context manager."""

    def __init__(self, samples: Samples) -> None:
        self.number = _anonymous_file()
        try:
            # Written, not copied into a mapping: that costs a page fault every 4 KiB, half of the time.
            left = samples.data.cast("B") if samples.size else memoryview(b"\0")  # nothing cannot be mapped
            while left:
                left = left[os.write(self.number, left) :]
        except BaseException:
            os.close(self.number)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("song")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


class _EncoderProcess:
    """A running encoder process, used by one thread at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - a command of our own
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Its threads are those that it is asked for; numpy would start one per core.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self._pipe = ours

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], samples: int, stopped: Stopped) -> dict[str, Any]:
        """Send a request and wait for its answer. The process has ended when this raises.

        Raises:
            EncoderDied: it ended without an answer.
            Cancelled: ``stopped`` returned true.
        """
        try:
            socket.send_fds(self._pipe, [json.dumps(request).encode() + b"\n"], [samples])
            return self._receive(stopped)
        except OSError as error:
            raise EncoderDied(f"its pipe broke: {type(error).__name__}, exit code {self.end()}") from error
        except BaseException:
            self.end()
            raise

    def end(self) -> int:
        """Kill the process, if it still runs. Returns its exit code, negative for a signal."""
        self._pipe.close()
        self._process.kill()
        return self._process.wait()

    def _receive(self, stopped: Stopped) -> dict[str, Any]:
        answer, deadline = b"", time.monotonic() + LONGEST_S
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while not answer.endswith(b"\n"):
            raise_if(stopped)
            if time.monotonic() > deadline:
                raise EncoderDied(f"no answer in {LONGEST_S:g} s")
            if poll.poll(_POLL_MS):
                if not (chunk := self._pipe.recv(_ANSWER_BYTES)):
                    raise EncoderDied(f"exit code {self._exit_code()}")
                answer += chunk
        found: dict[str, Any] = json.loads(answer)
        return found

    def _exit_code(self) -> int:
        """Return the exit code of a process that has closed its pipe."""
        try:
            return self._process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            return self.end()


def raise_if(stopped: Stopped) -> None:
    """Raise ``Cancelled`` when ``stopped`` returns true."""
    if stopped():
        raise Cancelled


def _request(samples: Samples, sample_rate: int) -> dict[str, Any]:
    channels, length = samples.shape
    return {"channels": channels, "samples": length, "sample_rate": sample_rate}


def _raise_failure(answer: dict[str, Any]) -> None:
    if "failure" not in answer:
        return
    if answer["failure"] is None:
        raise MemoryError
    cause = None if answer["errno"] is None else OSError(answer["errno"], os.strerror(answer["errno"]))
    raise RenderFailed(answer["failure"]) from cause
