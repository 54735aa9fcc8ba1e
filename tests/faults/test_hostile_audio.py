# SPDX-License-Identifier: Apache-2.0
"""Fault: an audio input is made to harm whoever reads it. It ends as ``input_unreadable``, and reaches nothing.

Two lines of defence, tested apart: what FFmpeg is allowed to do with the bytes, and what the decoder process could
still do if the bytes took it over. For the second, a program of the test's own plays the decoder, under real limits.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import soundfile

from acestep_consumer.audio.codec import check_decoder, decode, encode
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.audio.sandbox import process
from acestep_consumer.audio.sandbox.landlock import landlock_version
from acestep_consumer.domain.errors import Cancelled, InputUnreadable, RenderFailed
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Hostile = Callable[[str], None]

RATE = 48_000
ROOT = Path(__file__).parents[2]
CURE = "send WAV, FLAC, MP3, OGG, M4A or another common format"

# What a taken-over decoder runs: confined as the real one is, with its arguments.
CONFINED = """
import sys
sys.path += sys.argv.pop().split("\\n")
from acestep_consumer.audio.sandbox.__main__ import _import_lazy_modules
from acestep_consumer.audio.sandbox.landlock import ProcessLimits, confine
_import_lazy_modules()
import ctypes, os, signal, socket, subprocess, time
rate, most, cpu, wall, memory = map(int, sys.argv[1:6])
confine(ProcessLimits(cpu, wall, memory, most * 8))
def refused(call, *arguments):
    try:
        call(*arguments)
    except (OSError, MemoryError):
        return True
    return False
"""
NOTHING_BUT_REFUSED = "sys.exit(13 if all(found) else 12)"


@pytest.fixture
def song(tmp_path: Path) -> Path:
    return encode(np.full((2, RATE), 0.25, dtype=np.float32), tmp_path / "song", "flac", RATE).path


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """Puts a program in the decoder's place."""

    def put(program: str) -> None:
        monkeypatch.setattr(process, "_PROGRAM", CONFINED + program)

    return put


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that nobody is to connect to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)  # noqa: FBT003 - a positional-only switch
        yield server


def refusal(path: Path, max_seconds: float = 10) -> str:
    with pytest.raises(InputUnreadable) as caught:
        decode(path, sample_rate=RATE, max_seconds=max_seconds, what="the source audio")
    text = str(caught.value)
    assert text.startswith("the source audio ")
    assert str(path.parent) not in text
    return text


class TestBytes:
    @pytest.mark.parametrize(
        "text",
        ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://{address}/a.ts\n#EXT-X-ENDLIST\n",
         "#EXTM3U\nhttp://{address}/a.mp3\n",
         "ffconcat version 1.0\nfile 'http://{address}/a.wav'\n",
         "ffconcat version 1.0\nfile '{secret}'\n",
         "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
         "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nconcat:{secret}|{secret}\n#EXT-X-ENDLIST\n",
         "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
         "<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>http://{address}/</BaseURL></AdaptationSet></Period></MPD>",
         "[playlist]\nFile1=http://{address}/a.mp3\n",
         "<asx version='3.0'><entry><ref href='http://{address}/a'/></entry></asx>",
         "[Reference]\nRef1=http://{address}/a\n"],
        ids=["hls", "m3u", "concat-url", "concat-file", "hls-file", "hls-concat", "sdp", "dash", "pls", "asx", "ref"],
    )  # fmt: skip
    @pytest.mark.parametrize("suffix", ["", ".m3u8", ".wav"])
    def test_a_playlist_opens_neither_a_file_nor_a_connection(
        self, listener: socket.socket, song: Path, tmp_path: Path, text: str, suffix: str
    ) -> None:
        address = "{}:{}".format(*listener.getsockname())
        path = tmp_path / f"input{suffix}"
        path.write_text(text.format(address=address, secret=song), encoding="utf-8")
        assert refusal(path) == f"the source audio cannot be read as audio: {CURE}"
        with pytest.raises(BlockingIOError):
            listener.accept()

    def test_hours_of_silence_in_a_small_file_are_no_more_than_the_limit(self, tmp_path: Path) -> None:
        bomb = tmp_path / "bomb"
        soundfile.write(bomb, np.zeros(8_000 * 1_200, dtype=np.int16), 8_000, format="FLAC")
        assert bomb.stat().st_size < 1 << 16
        assert refusal(bomb, max_seconds=600) == "the source audio is longer than 600 seconds"

    def test_a_picture_that_fills_the_memory_is_not_loaded(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(process, "MEMORY_BYTES", 256 << 20)
        picture = b"\0image/png\0\x03\0" + bytes(200 << 20)

        def synchsafe(number: int) -> bytes:
            return bytes(number >> shift & 127 for shift in (21, 14, 7, 0))

        frame = b"APIC" + synchsafe(len(picture)) + b"\0\0" + picture
        (tmp_path / "input").write_bytes(b"ID3\x04\0\0" + synchsafe(len(frame)) + frame)
        text = refusal(tmp_path / "input")
        assert "needs more than" in text or "cannot be read as audio" in text

    def test_a_song_with_a_picture_on_its_cover_is_read_without_looking_at_it(self, tmp_path: Path) -> None:
        path = tmp_path / "song.mka"
        with av.open(str(path), "w", format="matroska") as out:
            picture = out.add_stream("mjpeg", rate=1)
            assert isinstance(picture, av.VideoStream)
            picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
            sound = out.add_stream("flac", rate=RATE, layout="stereo")
            assert isinstance(sound, av.AudioStream)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 4_608), dtype=np.int16), format="s16", layout="stereo")
            frame.sample_rate = RATE
            for packet in (*picture.encode(av.VideoFrame(16, 16, "yuvj420p")), *picture.encode(None)):
                out.mux(packet)
            for packet in (*sound.encode(frame), *sound.encode(None)):
                out.mux(packet)
        assert decode(path, sample_rate=RATE, max_seconds=1).shape == (2, 4_608)

    @pytest.mark.parametrize("seed", range(len(FORMATS)))
    def test_damaged_files_are_read_or_refused_and_never_more(self, seed: int, tmp_path: Path) -> None:
        chance = random.Random(seed)  # noqa: S311 - the same damage each time
        name = list(FORMATS)[seed]
        noise = np.random.default_rng(seed).normal(scale=0.1, size=(2, RATE // 4)).astype(np.float32)
        whole = encode(noise, tmp_path / "song", name, RATE).path.read_bytes()
        for _ in range(8):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 64)):
                damaged[chance.randrange(len(damaged) if chance.random() < 0.5 else 256)] = chance.randrange(256)
            (tmp_path / "input").write_bytes(damaged)
            with suppress(InputUnreadable):
                heard = decode(tmp_path / "input", sample_rate=RATE, max_seconds=1)
                assert heard.shape[0] == 2
                assert heard.shape[1] <= 1.2 * RATE


class TestTakenOver:
    """The bytes have won: what now?"""

    @pytest.mark.parametrize(
        ("program", "said"),
        [
            ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes the decoder"),
            ("ctypes.string_at(0)", "crashes the decoder"),
            ("sys.exit(1)", "crashes the decoder"),
            ("sys.exit(99)", "crashes the decoder"),
            ("sys.exit(0)", "returns invalid samples"),
            ("os.write(1, b'1234567'); sys.exit(0)", "returns invalid samples"),
            ("os.write(1, b'\\xff' * 8); sys.exit(0)", "not numbers"),
            ("os.write(2, b'task_id: forged' * 100_000); sys.exit(12)", "cannot be read as audio"),
            ("os.close(2); os.kill(os.getpid(), signal.SIGSTOP)", "crashes the decoder"),
        ],
    )
    def test_a_crash_or_nonsense_is_an_unreadable_input_with_a_cure(
        self, hostile: Hostile, song: Path, program: str, said: str
    ) -> None:
        hostile(program)
        text = refusal(song)
        assert said in text
        assert text.endswith(CURE) or said == "not numbers"

    @pytest.mark.parametrize("program", ["while True: pass", "time.sleep(60)"], ids=["busy", "asleep"])
    def test_what_goes_on_for_ever_is_ended_at_its_limit(
        self, hostile: Hostile, song: Path, monkeypatch: pytest.MonkeyPatch, program: str
    ) -> None:
        monkeypatch.setattr(process, "CPU_S" if "pass" in program else "WALL_S", 1)
        hostile(program)
        began = time.monotonic()
        assert "takes more than" in refusal(song)
        assert time.monotonic() - began < 30

    def test_no_more_is_written_than_the_samples_that_may_come(self, hostile: Hostile, song: Path) -> None:
        """A disk is filled otherwise: whatever the decoder writes beyond the limit, the kernel refuses."""
        hostile("""
total = 0
while not refused(os.write, 1, bytes(1 << 16)):
    total += 1 << 16
sys.exit(13 if total <= most * 8 + (1 << 16) else 12)
""")
        assert "longer than" in refusal(song)

    def test_it_has_no_memory_to_take(self, hostile: Hostile, song: Path) -> None:
        hostile(f"found = [refused(bytearray, 1 << 30)]\n{NOTHING_BUT_REFUSED}")
        assert "longer than" in refusal(song)

    def test_it_finds_no_secret_and_no_open_file(
        self, hostile: Hostile, song: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
        monkeypatch.setenv("PYTHONSTARTUP", "/dev/null")
        with song.open("rb") as ours:
            os.set_inheritable(ours.fileno(), True)  # noqa: FBT003 - a positional-only switch
            hostile("""
names = set(os.environ) - {"LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH"}
def closed(number):
    return refused(os.fstat, number)
sys.exit(13 if not names and all(map(closed, range(3, 1000))) else 12)
""")
            assert "longer than" in refusal(song)

    def test_it_opens_no_file_and_no_socket(self, hostile: Hostile, song: Path) -> None:
        hostile(f"""
found = [refused(os.open, name, os.O_RDONLY) for name in ("/etc/passwd", "/proc/self/environ", "/", "/dev/null")]
found += [refused(os.open, "new", os.O_CREAT | os.O_WRONLY), refused(socket.socket), refused(os.pipe)]
found += [refused(os.dup, 0), refused(socket.socket, socket.AF_UNIX)]
{NOTHING_BUT_REFUSED}
""")
        assert "longer than" in refusal(song)

    @pytest.mark.skipif(landlock_version() < 4, reason="this kernel has no Landlock, or one that knows no TCP")
    def test_where_linux_has_landlock_making_room_for_a_file_helps_nothing(
        self, hostile: Hostile, song: Path, listener: socket.socket
    ) -> None:
        """With a stream closed there is room for one file or socket; the kernel still lets it reach nothing."""
        host, port = listener.getsockname()
        hostile(f"""
os.close(0)
names = ("/etc/passwd", "/proc/self/environ", f"/proc/{{os.getppid()}}/environ", "/", "/tmp", "/dev/null")
found = [refused(os.open, name, os.O_RDONLY) for name in names]
found += [refused(os.listdir, "/"), refused(os.mkdir, "/tmp/taken-over"), refused(os.unlink, {str(song)!r})]
found += [refused(os.open, "/tmp/new", os.O_CREAT | os.O_WRONLY), refused(os.execv, sys.executable, ["python"])]
found += [refused(os.kill, os.getppid(), 0)] if {landlock_version()} >= 6 else []
with socket.socket() as line:
    found += [refused(line.connect, ({host!r}, {port})), refused(line.bind, ("127.0.0.1", 0))]
{NOTHING_BUT_REFUSED}
""")
        assert "longer than" in refusal(song)
        assert song.exists()
        with pytest.raises(BlockingIOError):
            listener.accept()


class TestItsEnd:
    def test_it_ends_with_the_job_that_wanted_it(self, hostile: Hostile, song: Path) -> None:
        hostile("time.sleep(60)")
        before, began = set(children_of(os.getpid())), time.monotonic()
        with pytest.raises(Cancelled):
            decode(song, sample_rate=RATE, max_seconds=10, stopped=lambda: time.monotonic() - began > 0.5)
        assert time.monotonic() - began < 20
        assert set(children_of(os.getpid())) <= before

    async def test_it_ends_with_the_process_that_started_it_however_that_died(self, song: Path) -> None:
        script = f"""
from pathlib import Path
from acestep_consumer.audio.codec import decode
from acestep_consumer.audio.sandbox import process
process._PROGRAM = {CONFINED + "time.sleep(60)"!r}
decode(Path({str(song)!r}), sample_rate=48_000, max_seconds=10)
"""
        renderer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)  # noqa: ASYNC220 - a millisecond
        try:
            await eventually(lambda: confined_children_of(renderer.pid))
            [decoder] = confined_children_of(renderer.pid)
        finally:
            renderer.send_signal(signal.SIGKILL)
            renderer.wait()
        await eventually(lambda: state_of(decoder) == "Z")

    def test_an_input_leaves_no_work_file_behind(self, song: Path) -> None:
        decode(song, sample_rate=RATE, max_seconds=10)
        assert list(song.parent.iterdir()) == [song]

    def test_a_machine_that_can_start_no_decoder_does_not_blame_the_input(
        self, song: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert check_decoder() is None
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(RenderFailed, match="no process can be started to read the source audio"):
            decode(song, sample_rate=RATE, max_seconds=10, what="the source audio")
        assert check_decoder() == "no process can be started to read the audio input (FileNotFoundError)"

    def test_a_full_disk_is_not_the_inputs_fault(self, hostile: Hostile, song: Path) -> None:
        hostile("sys.exit(15)")
        with pytest.raises(RenderFailed, match="no room for the samples"):
            decode(song, sample_rate=RATE, max_seconds=10)


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def confined_children_of(pid: int) -> list[int]:
    """Those that have bound their life to their parent's, which comes first of all."""
    return [child for child in children_of(pid) if "NoNewPrivs:\t1" in Path(f"/proc/{child}/status").read_text()]


def state_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def test_a_wav_of_no_samples_whose_header_promises_many_is_refused(tmp_path: Path) -> None:
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2**32 - 1, b"WAVE", b"fmt ", 16, 1, 2, RATE, RATE * 4, 4, 16,
                       b"data", 2**32 - 1)  # fmt: skip
    (tmp_path / "input").write_bytes(head)
    assert refusal(tmp_path / "input") == "the source audio contains no samples"
