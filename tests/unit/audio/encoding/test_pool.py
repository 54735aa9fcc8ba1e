# SPDX-License-Identifier: Apache-2.0
"""Encoder processes: what they write, and what a dead, hung, cancelled or orphaned one leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from acestep_consumer.audio import codec
from acestep_consumer.audio.encoding import pool as module
from acestep_consumer.audio.encoding.pool import EncoderPool
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.audio.measures import measures_of
from acestep_consumer.audio.time_warping import warped
from acestep_consumer.concurrency import slots
from acestep_consumer.concurrency.priority import rank_of
from acestep_consumer.domain.errors import Cancelled, DiskFull, RenderFailed
from tests.support.music import music
from tests.support.waiting import WITHIN_S

RATE = 48_000
SONG = music(0.5)

WRITES_THREADS = """
import json, socket, sys
pipe = socket.socket(fileno=int(sys.argv[1]))
asked = json.loads(socket.recv_fds(pipe, 9_999, 1)[0])
with open(asked["path"], "w") as file:
    file.write(str(asked["threads"]))
pipe.sendall(b'{"levels": null}\\n')
pipe.recv(1)
"""
"""An encoder that writes into the file, in place of a song, how many threads it may use."""


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def pool() -> Iterator[EncoderPool]:
    """Two real processes."""
    made = EncoderPool(2)
    made.start()
    yield made
    made.close()


@pytest.fixture
def broken_pool(tmp_path: Path) -> Iterator[Callable[[str], EncoderPool]]:
    """A pool of one process, of the given program, which gets the socket's number as its argument."""
    made: list[EncoderPool] = []

    def make(program: str) -> EncoderPool:
        made.append(EncoderPool(1, [sys.executable, "-c", program]))
        return made[-1]

    yield make
    for each in made:
        each.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def open_memory() -> int:
    """How many songs this process has in shared memory."""
    links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))  # noqa: PTH208 - as texts
    return sum(1 for link in links if link.is_symlink() and "memfd:song" in os.readlink(link))  # noqa: PTH115 - as above


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_the_one_that_this_process_would_write(name: str, pool: EncoderPool, tmp_path: Path) -> None:
    wanted = codec.encode(SONG, tmp_path / "here", name, RATE)
    with pool.slot(never) as encode:
        found = encode(SONG, tmp_path / "there", name, RATE)
    # The serial number of an Ogg stream is random, and its checksums follow it.
    alike = found.path.stat().st_size == wanted.path.stat().st_size
    assert alike if wanted.path.suffix in {".ogg", ".opus"} else found.path.read_bytes() == wanted.path.read_bytes()
    assert (found.duration_s, found.channels, found.sample_rate) == (0.5, 2, RATE)
    assert open_memory() == 0


@pytest.mark.parametrize(
    ("name", "others", "threads"),
    [("flac", 0, 4), ("flac", 13, 3), ("flac", 15, 1), ("mp3", 0, 1)],
    ids=["one song", "two cores left", "as many songs as cores", "a format that one thread writes"],
)
def test_flac_has_the_threads_of_cores_that_no_other_song_needs(
    name: str, others: int, threads: int, tmp_path: Path
) -> None:
    pool = EncoderPool(16, [sys.executable, "-c", WRITES_THREADS])
    try:
        with ExitStack() as held:
            for _ in range(others):
                held.enter_context(pool.slot(never))
            with pool.slot(never) as encode:
                assert encode(SONG, tmp_path / "song", name, RATE).path.read_text() == str(threads)
        with ExitStack() as held:  # each slot is free again
            for _ in range(pool.size):
                held.enter_context(pool.slot(never))
    finally:
        pool.close()


def test_a_full_pool_leaves_later_songs_their_additional_threads(tmp_path: Path) -> None:
    pool = EncoderPool(4, [sys.executable, "-c", WRITES_THREADS])
    try:
        with ExitStack() as held, pool.slot(never) as encode:
            for _ in range(pool.size - 1):
                held.enter_context(pool.slot(never))
            with pool._spare_slots(FORMATS["flac"]) as spare:
                assert spare == 0
                held.close()
                assert encode(SONG, tmp_path / "song", "flac", RATE).path.read_text() == "2"
    finally:
        pool.close()


def test_no_more_than_a_quarter_of_the_cores_are_additional_threads(tmp_path: Path) -> None:
    pool = EncoderPool(8, [sys.executable, "-c", WRITES_THREADS])
    try:
        with pool.slot(never) as first, pool.slot(never):
            assert first(SONG, tmp_path / "song", "flac", RATE).path.read_text() == "3"
    finally:
        pool.close()


def test_measures_are_those_that_this_process_would_find(pool: EncoderPool) -> None:
    song = music(1.0)
    with pool.measurer(never) as measure:
        assert measure(song, RATE) == measures_of(song, RATE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_song_that_is_no_song_has_no_measures(value: float, pool: EncoderPool) -> None:
    song = music(1.0)
    song[0, 7] = value
    with pool.measurer(never) as measure:
        assert measure(song, RATE) is None


def test_a_song_that_kills_two_processes_cannot_be_measured(broken_pool: Callable[[str], EncoderPool]) -> None:
    with (
        broken_pool("raise SystemExit(3)").measurer(never) as measure,
        pytest.raises(RenderFailed, match="the encoder crashed on this song"),
    ):
        measure(SONG, RATE)


@pytest.mark.parametrize(("tokens", "frames"), [(1, 1), (7, 40), (90, 300)])
def test_lyrics_are_warped_as_this_process_would(tokens: int, frames: int, pool: EncoderPool) -> None:
    draw = np.random.default_rng(tokens)
    matrices = np.stack([draw.normal(size=(tokens, frames)), draw.random((tokens, frames))]).astype(np.float32)
    sung = draw.random(tokens) < 0.8
    with pool.warper(never) as warp:
        assert warp(matrices, sung) == warped(matrices, sung)
    assert open_memory() == 0


def test_lyrics_that_kill_two_processes_cannot_be_aligned(broken_pool: Callable[[str], EncoderPool]) -> None:
    with (
        broken_pool("raise SystemExit(3)").warper(never) as warp,
        pytest.raises(RenderFailed, match="the encoder crashed on this song"),
    ):
        warp(np.zeros((2, 1, 1), dtype=np.float32), np.ones(1, dtype=np.bool_))


def test_errors_of_the_encoder_keep_their_texts(pool: EncoderPool, tmp_path: Path) -> None:
    bad = SONG.copy()
    bad[1, 7] = np.nan
    with pool.slot(never) as encode:
        for samples, rate, text in (
            (bad, RATE, "^the model returned samples that are not finite numbers, or none$"),
            (SONG[:, :0], RATE, "^the model returned samples that are not finite numbers, or none$"),
            (SONG, 7_001, "^the mp3 encoder failed"),
        ):
            with pytest.raises(RenderFailed, match=text):
                encode(samples, tmp_path / "song", "mp3", rate)
    assert list(tmp_path.iterdir()) == []
    assert open_memory() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", ["mp3", "flac"])
def test_a_full_disk_is_recognised_as_that(name: str, pool: EncoderPool, tmp_path: Path) -> None:
    (tmp_path / f"song.{name}").symlink_to("/dev/full")
    with pool.slot(never) as encode, pytest.raises(RenderFailed) as failure:
        encode(SONG, tmp_path / "song", name, RATE)
    assert DiskFull.caused(failure.value)


def test_a_process_that_was_killed_is_replaced_and_its_song_is_encoded(pool: EncoderPool, tmp_path: Path) -> None:
    for process in pool._idle:
        process._process.send_signal(signal.SIGSTOP)
    done: list[codec.Encoded] = []

    def encode_one() -> None:
        with pool.slot(never) as encode:
            done.append(encode(SONG, tmp_path / "song", "mp3", RATE))

    stopped = list(pool._idle)
    thread = threading.Thread(target=encode_one)
    thread.start()
    wait_for(lambda: len(pool._idle) == 1)
    (victim,) = set(stopped) - set(pool._idle)
    victim._process.kill()
    for process in pool._idle:
        process._process.send_signal(signal.SIGCONT)
    thread.join(WITHIN_S)
    assert done[0].path.stat().st_size > 0
    assert open_memory() == 0


def test_a_song_that_kills_two_processes_fails_alone(broken_pool: Callable[[str], EncoderPool], tmp_path: Path) -> None:
    deadly = broken_pool("import os, socket, sys; socket.socket(fileno=int(sys.argv[1])).recv(9); os._exit(7)")
    for _ in range(2):
        with deadly.slot(never) as encode, pytest.raises(RenderFailed, match="the mp3 encoder crashed on this song"):
            encode(SONG, tmp_path / "song", "mp3", RATE)
    assert open_memory() == 0


HUNG = "import time; time.sleep(3600)"


def test_a_cancelled_song_ends_its_process_and_frees_its_memory(
    broken_pool: Callable[[str], EncoderPool], tmp_path: Path
) -> None:
    hung, seen = broken_pool(HUNG), []

    def stopped() -> bool:
        seen.append(open_memory())
        return len(seen) > 1

    hung.start()
    (process,) = hung._idle
    with hung.slot(stopped) as encode, pytest.raises(Cancelled):
        encode(SONG, tmp_path / "song", "mp3", RATE)
    assert seen == [1, 1]
    assert open_memory() == 0
    assert not process.alive


def test_a_process_that_takes_too_long_counts_as_dead(
    broken_pool: Callable[[str], EncoderPool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "LONGEST_S", 0.0)
    with broken_pool(HUNG).slot(never) as encode, pytest.raises(RenderFailed, match="crashed"):
        encode(SONG, tmp_path / "song", "mp3", RATE)


def test_a_job_that_is_cancelled_while_it_waits_for_an_encoder_ends(
    broken_pool: Callable[[str], EncoderPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_CHECK_S", 0.01)
    one = broken_pool(HUNG)
    with one.slot(never), pytest.raises(Cancelled), one.slot(lambda: True):
        pass


def test_of_the_jobs_that_wait_for_an_encoder_those_of_a_lower_rank_go_first(
    broken_pool: Callable[[str], EncoderPool],
) -> None:
    """Three songs of priority 0, one of 9 that comes last, and one whose job is cancelled meanwhile."""
    one, served, cancelled = broken_pool(HUNG), list[str](), threading.Event()

    def encode(name: str, rank: float, stopped: Callable[[], bool]) -> None:
        with suppress(Cancelled), one.slot(stopped, rank):
            served.append(name)

    def queued(count: int) -> bool:
        return len(one._slots._queue) == count

    threads = []
    with one.slot(never):
        for place, (name, priority) in enumerate(
            [("first", 0), ("second", 0), ("given up", 5), ("third", 0), ("urgent", 9)]
        ):
            stopped = cancelled.is_set if name == "given up" else never
            threads.append(threading.Thread(target=encode, args=(name, rank_of(priority, place), stopped)))
            threads[-1].start()
            wait_for(partial(queued, place + 1))
        cancelled.set()
        wait_for(partial(queued, 4))
        assert served == []
    for thread in threads:
        thread.join(WITHIN_S)
    assert served == ["urgent", "first", "second", "third"]
    with one.slot(never):  # each slot is free again
        assert one._slots.enter_now() is None


PARENT = """
import os, sys, time, numpy as np
from pathlib import Path
from acestep_consumer.audio.encoding.pool import EncoderPool
pool = EncoderPool(2)
pool.start()
print(*pool.idle_pids, flush=True)
with pool.slot(lambda: False) as encode:
    encode(np.zeros((2, 48_000 * 3_600), dtype=np.float32), Path(sys.argv[1]), "aac", 48_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_processes_end_when_the_renderer_is_killed_in_the_middle_of_a_song(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "song")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        wait_for((tmp_path / "song.aac").exists)
        parent.kill()
    wait_for(lambda: not any(is_running(pid) for pid in pids))
