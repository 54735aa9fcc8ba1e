# SPDX-License-Identifier: Apache-2.0
"""A renderer process without a model: real pipe, real files, and work that a request's prompt describes.

Words of the prompt that say something, in any order: ``takes=0.5`` (seconds), ``until=PATH`` (a file that somebody
makes), ``bytes=9000000`` (size of each song), ``crash`` (the process dies of it). A song is noise, and other noise each
time: two renderings of one job never agree, as they would not with random seeds. Its card has 24 GB, or as many as
``MAX_CUDA_VRAM`` says.

Run by the supervisor as ``python -m tests.support.light_engine FD``.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import wave
from dataclasses import dataclass, field, replace
from pathlib import Path

from acestep_consumer.domain.job import LoadedModel, Rendering, Track
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.framing import FrameSocket
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
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
    Stop,
)
from acestep_schemas.events import ErrorCode

REPORT = RendererReport(
    device="cpu",
    device_name="none",
    vram_gb=24,
    models=(LoadedModel("acestep-v15-turbo", Variant.TURBO),),
    formats=("wav",),
)
RATE, CHANNELS, SAMPLE_BYTES = 48_000, 2, 2
STEPS, STEP_S = 4, 0.01


@dataclass(slots=True)
class Work:
    """What a prompt describes."""

    takes_s: float = 0.0
    until: Path | None = None
    song_bytes: int = 20_000
    crash: bool = False

    @classmethod
    def of(cls, prompt: str) -> "Work":
        """Read the words that say something."""
        words = dict(word.partition("=")[::2] for word in prompt.split())
        return cls(
            takes_s=float(words.get("takes", 0)),
            until=Path(words["until"]) if "until" in words else None,
            song_bytes=int(words.get("bytes", 20_000)),
            crash="crash" in words,
        )


@dataclass
class Engine:
    """Answers requests, each in a thread of its own."""

    pipe: FrameSocket
    stopped: set[int] = field(default_factory=set)

    def send(self, message: FromEngine) -> None:
        """Send one message; exit when the pipe is closed."""
        try:
            self.pipe.send(FROM_ENGINE.dump_json(message))
        except OSError:
            os._exit(0)

    def handle(self, message: object) -> None:
        """Act on one message."""
        match message:
            case Configure(settings=settings):
                if "LIGHT_LOADS_FOR_EVER" in os.environ:
                    self.send(Loading(step="a model without end", phase="models"))
                    return
                self.send(Ready(report=replace(REPORT, vram_gb=settings.max_vram_gb or REPORT.vram_gb)))
            case SetLogLevel(log_level=level):
                sys.stderr.write(json.dumps({"event": "engine's log level", "level": level}) + "\n")
                sys.stderr.flush()
            case Stop(request_id=request_id):
                self.stopped.add(request_id)
            case Render():
                threading.Thread(target=self.render, args=(message,), daemon=True).start()

    def render(self, request: Render) -> None:
        """Work, and answer with the songs, or that it was stopped."""
        work = Work.of(request.job.request.prompt)
        if work.crash:
            os.kill(os.getpid(), signal.SIGKILL)
        self.send(self.answer(request, work))
        self.stopped.discard(request.request_id)

    def answer(self, request: Render, work: Work) -> FromEngine:
        """Do the work; nobody waits for it when it was stopped, or when its folder is gone."""
        if self.finishes(request.request_id, work):
            try:
                return Done(request_id=request.request_id, result=render_songs(request, work.song_bytes))
            except FileNotFoundError:
                reason = "the renderer failed on this request (FileNotFoundError)"  # as the real one says
                return RequestFailed(request_id=request.request_id, code=ErrorCode.RENDER_FAILED, reason=reason)
        return RequestFailed(request_id=request.request_id, code=ErrorCode.CANCELLED, reason="cancelled")

    def finishes(self, request_id: int, work: Work) -> bool:
        """Let the work take its time; False when nobody waits for it any more."""
        for step in range(1, STEPS + 1):
            if not self.wait(request_id, work.takes_s / STEPS):
                return False
            self.send(Progressed(request_id=request_id, fraction=step / STEPS, stage="render"))
        while work.until is not None and not work.until.exists():
            if not self.wait(request_id, STEP_S):
                return False
        return True

    def wait(self, request_id: int, seconds: float) -> bool:
        """Let time pass; False as soon as the request is stopped."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and request_id not in self.stopped:
            time.sleep(min(STEP_S, left))
        return request_id not in self.stopped


def render_songs(request: Render, song_bytes: int) -> Rendering:
    """Write the job's songs."""
    tracks = tuple(
        write(request.folder / f"{index}.wav", seed, song_bytes) for index, seed in enumerate(request.job.seeds)
    )
    return Rendering(tracks=tracks, render_s=0.01, encode_s=0.001)


def write(path: Path, seed: int, song_bytes: int) -> Track:
    """Write noise as a WAV file of about ``song_bytes``."""
    frames = max(1, song_bytes // (CHANNELS * SAMPLE_BYTES))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(CHANNELS)
        file.setsampwidth(SAMPLE_BYTES)
        file.setframerate(RATE)
        file.writeframes(os.urandom(frames * CHANNELS * SAMPLE_BYTES))
    return Track(
        path=path,
        seed=seed,
        format="wav",
        content_type="audio/wav",
        sample_rate=RATE,
        channels=CHANNELS,
        duration_s=frames / RATE,
    )


def main() -> None:
    """Serve until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    engine = Engine(FrameSocket(socket.socket(fileno=int(sys.argv[1]))))
    for payload in engine.pipe:
        engine.handle(TO_ENGINE.validate_json(payload))


if __name__ == "__main__":
    main()
