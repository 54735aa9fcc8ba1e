# SPDX-License-Identifier: Apache-2.0
"""Processor time that encoding takes, and in which process: the old way and the new one.

Old: FFmpeg's encoders, frame by frame, in a thread of the renderer's process. New: encoder processes that get the song
in shared memory, with LAME for MP3. Both in one run, in turns, on the same sound: music-like tones with envelopes, or
noise, which is what random weights make.

Core seconds are for a song of 300 seconds: `renderer` those of this process, `total` with those of the encoders.
`speed` is that of a thread of pure Python in this process beside the encoding, 1 when nothing is encoded; such a thread
launches the GPU's work. On a busy machine, or with as many songs at a time as cores, it shows the load as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from acestep_consumer.audio.codec import Samples
from acestep_consumer.audio.encoding.encode import write_by_ffmpeg
from acestep_consumer.audio.encoding.pool import EncoderPool
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.config.cores import usable_cores
from tests.support.music import music

RATE = 48_000
SONG_S = 300
_SPEED_S = 1.0
_FORMATS = ("mp3", "opus", "aac", "flac", "wav")
_TICKS = os.sysconf("SC_CLK_TCK")

Encode = Callable[[str, Path], None]


@dataclass(frozen=True, slots=True)
class Cost:
    """What encoding one song of 300 s costs, and what it leaves of a thread's speed."""

    sound: str
    audio_format: str
    way: str
    renderer_core_s: float
    total_core_s: float
    wall_s: float
    speed: float
    kilobits_s: float


class PythonThread:
    """A thread that counts. ``rate``: rounds a second since it was last asked."""

    def __init__(self) -> None:
        self._rounds, self._since, self._ended = 0, time.monotonic(), False
        self.cpu_s = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._ended:
            for number in range(1_000):
                divmod(number, 7)
            self._rounds += 1
            self.cpu_s = time.thread_time()

    def rate(self) -> float:
        now, rounds = time.monotonic(), self._rounds
        found = rounds / (now - self._since)
        self._rounds, self._since = self._rounds - rounds, now
        return found

    def end(self) -> None:
        self._ended = True


def sound_of(name: str, seconds: float) -> Samples:
    if name == "music":
        return music(seconds, RATE)
    noise = np.random.default_rng(1).normal(0, 0.2, (2, round(seconds * RATE)))
    return noise.clip(-1, 1).astype(np.float32)


def old_way(samples: Samples) -> Encode:
    """One song, in this process, with the parameters of then."""

    def encode(name: str, stem: Path) -> None:
        wanted = FORMATS[name]
        if wanted.codec == "libopus":
            wanted = replace(wanted, compression_level=None)
        write_by_ffmpeg(samples, stem.with_suffix(wanted.suffix), wanted, RATE)

    return encode


def new_way(samples: Samples, pool: EncoderPool) -> Encode:
    """One song, in an encoder process."""

    def encode(name: str, stem: Path) -> None:
        with pool.slot(lambda: False) as write:
            write(samples, stem, name, RATE)

    return encode


def measure(way: str, encode: Encode, arguments: argparse.Namespace, cpu_of_encoders: Callable[[], float]) -> Cost:
    """Encode some songs at the same time, twice: for the processor's time, and beside a thread of Python."""
    songs, scale = arguments.at_once, SONG_S / arguments.seconds
    with tempfile.TemporaryDirectory(prefix="bench-encode-") as folder, ThreadPoolExecutor(songs) as threads:
        stems = [Path(folder) / str(number) for number in range(songs)]

        def encode_all() -> None:
            list(threads.map(lambda stem: encode(arguments.audio_format, stem), stems))

        here, there, began = time.process_time(), cpu_of_encoders(), time.monotonic()
        encode_all()
        wall_s = time.monotonic() - began
        here, there = time.process_time() - here, cpu_of_encoders() - there
        size = next(Path(folder).iterdir()).stat().st_size
        return Cost(
            sound=arguments.sound,
            audio_format=arguments.audio_format,
            way=way,
            renderer_core_s=round(here * scale / songs, 2),
            total_core_s=round((here + there) * scale / songs, 2),
            wall_s=round(wall_s * scale, 2),
            speed=round(speed_beside(encode_all), 2),
            kilobits_s=round(size * 8 / 1_000 / arguments.seconds),
        )


def speed_beside(work: Callable[[], None]) -> float:
    """Return the speed of a Python thread while this works, as a part of its speed alone."""
    thread = PythonThread()
    time.sleep(_SPEED_S)
    alone = thread.rate()
    work()
    beside = thread.rate()
    thread.end()
    return beside / alone


@contextmanager
def encoders(count: int) -> Iterator[tuple[EncoderPool, Callable[[], float]]]:
    """Yield a pool, and the function that returns the core seconds of its processes so far."""
    pool = EncoderPool(count)
    pool.start()
    pids = pool.idle_pids

    def cpu_s() -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split() for pid in pids]
        return sum(int(each[11]) + int(each[12]) for each in fields) / _TICKS

    try:
        yield pool, cpu_s
    finally:
        pool.close()


def main() -> int:
    """Measure every format, old and new; print a table, or JSON."""
    arguments = _parser().parse_args()
    costs = []
    with encoders(usable_cores()) as (pool, cpu_s):
        for sound in arguments.sounds:
            samples = sound_of(sound, arguments.seconds)
            for name in arguments.formats:
                case = argparse.Namespace(**{**vars(arguments), "sound": sound, "audio_format": name})
                costs.append(measure("old", old_way(samples), case, cpu_s))
                costs.append(measure("new", new_way(samples, pool), case, cpu_s))
                if not arguments.json:
                    _print(costs[-2:], head=len(costs) == 2)
    if arguments.json:
        print(json.dumps([asdict(cost) for cost in costs]))  # noqa: T201 - a command's output
    return 0


def _print(costs: list[Cost], *, head: bool) -> None:
    if head:
        print("sound  format way  renderer core s  total core s  wall s  speed  kbit/s")  # noqa: T201 - as above
    for cost in costs:
        print(  # noqa: T201 - as above
            f"{cost.sound:6} {cost.audio_format:6} {cost.way:4} {cost.renderer_core_s:15} {cost.total_core_s:13}"
            f" {cost.wall_s:7} {cost.speed:6} {cost.kilobits_s:7}",
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", nargs="+", default=["music", "noise"], choices=["music", "noise"], help="(both)")
    parser.add_argument("--formats", nargs="+", default=list(_FORMATS), choices=list(FORMATS), help=f"{_FORMATS}")
    parser.add_argument("--seconds", type=float, default=60, help="of sound; results are for 300 (60)")
    parser.add_argument("--at-once", type=int, default=1, help=f"songs at the same time (1); cores: {usable_cores()}")
    parser.add_argument("--json", action="store_true", help="print one list of objects")
    return parser


if __name__ == "__main__":
    sys.exit(main())
