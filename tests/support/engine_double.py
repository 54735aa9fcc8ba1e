# SPDX-License-Identifier: Apache-2.0
"""An engine process without a model: real pipe, real frames, behaviour chosen by the prompt.

Run by the supervisor as ``python -m tests.support.engine_double FD``.
"""

import os
import signal
import socket
import sys
import threading
import time
import wave
from pathlib import Path

from acestep_consumer.domain.job import LoadedModel, Rendering, Track
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.framing import FrameSocket
from acestep_consumer.engine.heartbeat import heartbeat
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
    Alive,
    Configure,
    Done,
    FromEngine,
    Loading,
    Progressed,
    Ready,
    Render,
    RendererReport,
    RequestFailed,
    SetLogLevel,
    SetMemoryShare,
    Stop,
    Unusable,
)
from acestep_schemas.events import ErrorCode
from tests.support.engine_stats import engine_stats

REPORT = RendererReport(
    device="cpu",
    device_name="none",
    vram_gb=24,
    models=(LoadedModel("acestep-v15-turbo", Variant.TURBO),),
    formats=("wav", "mp3", "flac"),
)


class Double:
    def __init__(self, pipe: FrameSocket) -> None:
        self.pipe = pipe
        self.stopped: set[int] = set()
        self.memory_gb: float | None = None
        self.log_level = ""

    def send(self, message: FromEngine) -> None:
        self.pipe.send(FROM_ENGINE.dump_json(message))

    def handle(self, message: object) -> None:
        match message:
            case Configure(memory_gb=memory, log_level=level):
                self.memory_gb, self.log_level = memory, level
                self.load(message.settings.config_path)
            case SetMemoryShare(memory_gb=memory):
                self.memory_gb = memory
            case SetLogLevel(log_level=level):
                self.log_level = level
            case Stop(request_id=request_id):
                self.stopped.add(request_id)
            case Render():
                threading.Thread(target=self.render, args=(message,), daemon=True).start()

    def load(self, model: str) -> None:
        """Load the model, as its name says."""
        match model.split():
            case ["missing"]:
                self.send(Unusable(reason="no checkpoint named missing"))
            case ["dies-while-loading"]:
                os._exit(7)
            case ["never-ready"]:
                self.send(Loading(step="for ever", phase="models"))
            case ["paused-once", mark]:
                self.pause_once(Path(mark))
            case ["slowly-ready"]:
                threading.Thread(target=self.load_slowly, daemon=True).start()
            case _:
                self.send(Ready(report=REPORT))

    def render(self, request: Render) -> None:
        words = request.job.request.prompt.split()
        if self.leave_open(request.request_id, words):
            return
        self.take_time(request, words)
        for step in range(1, 5):
            self.send(Progressed(request_id=request.request_id, fraction=step / 4, stage="render"))
        self.send(Done(request_id=request.request_id, result=render_songs(request)))

    def leave_open(self, request_id: int, words: list[str]) -> bool:
        """Behave in a way that does not end with a song, if that is asked for."""
        match words[0]:
            case "fail":
                self.send(RequestFailed(request_id=request_id, code=ErrorCode.RENDER_FAILED, reason="it broke"))
            case "wait":
                self.wait(request_id, Path(words[1]))
            case "deaf":
                Path(words[1]).touch()
            case "rant-once" if not Path(words[1]).exists():
                Path(words[1]).touch()
                self.pipe.send(b"what?")
            case _:
                return False
        return True

    def take_time(self, request: Render, words: list[str]) -> None:
        """Do, or suffer, what comes before the song."""
        match words[0]:
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "log-level":
                Path(words[1]).write_text(self.log_level)
            case "crash-once":
                self.crash_once(Path(words[1]))
            case "tell":
                self.send(engine_stats(songs_done=len(request.job.seeds), memory_limit_gb=self.memory_gb or 40))
            case "hang-once":
                self.hang_once(Path(words[1]))
            case "swell-once":
                self.swell_once(Path(words[1]), int(words[2]))
            case "meet" | "meet-and-crash":
                self.meet(request, Path(words[1]), int(words[2]), fatal=words[0] == "meet-and-crash")

    def pause_once(self, mark: Path) -> None:
        """Load, and be paused meanwhile as by SIGSTOP from outside; the next process is not."""
        with heartbeat(lambda: self.send(Alive()), every_s=0.1):
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
        self.send(Ready(report=REPORT))

    def load_slowly(self) -> None:
        for part in range(8):
            self.send(Loading(step=f"part {part}", phase="models"))
            time.sleep(0.5)
        self.send(Ready(report=REPORT))

    def crash_once(self, mark: Path) -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def hang_once(self, mark: Path) -> None:
        """Send stats for ever, but do nothing."""
        if not mark.exists():
            mark.touch()
            while True:
                self.send(engine_stats(songs_done=0))
                time.sleep(0.02)

    def swell_once(self, mark: Path, mib: int) -> None:
        """Hold so much memory, and make progress."""
        if not mark.exists():
            mark.touch()
            held = b"x" * (mib << 20)
            while held:
                self.send(Progressed(request_id=1, fraction=0.5, stage="render"))
                time.sleep(0.02)

    def meet(self, request: Render, log_file: Path, company: int, *, fatal: bool) -> None:
        """Note the way in, wait until so many have come (in this process or one before), and note the way out."""
        seed = request.job.seeds[0]
        note(log_file, f"{os.getpid()} in {seed}")
        while sum(" in " in line for line in log_file.read_text().splitlines()) < company:
            time.sleep(0.01)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        note(log_file, f"{os.getpid()} out {seed}")

    def wait(self, request_id: int, mark: Path) -> None:
        """Work until stopped, then leave a mark."""
        mark.with_suffix(".began").touch()
        while request_id not in self.stopped:
            time.sleep(0.01)
        mark.touch()
        self.send(RequestFailed(request_id=request_id, code=ErrorCode.CANCELLED, reason="stopped"))


def note(log_file: Path, line: str) -> None:
    """Append a line in one piece, whoever else writes."""
    file = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def render_songs(request: Render) -> Rendering:
    return Rendering(
        tracks=tuple(write_song(request.folder / f"{i}.wav", seed) for i, seed in enumerate(request.job.seeds)),
        render_s=0.01,
        encode_s=0.001,
    )


def write_song(path: Path, seed: int, seconds: float = 0.1) -> Track:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(seed.to_bytes(8, "little", signed=False)[:4] * int(48_000 * seconds))
    return Track(
        path=path,
        seed=seed,
        format="wav",
        content_type="audio/wav",
        sample_rate=48_000,
        channels=2,
        duration_s=seconds,
    )


def main() -> None:
    pipe = FrameSocket(socket.socket(fileno=int(sys.argv[1])))
    double = Double(pipe)
    for payload in pipe:
        double.handle(TO_ENGINE.validate_json(payload))


if __name__ == "__main__":
    main()
