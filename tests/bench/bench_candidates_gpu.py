# SPDX-License-Identifier: Apache-2.0
"""What the best of several costs beside as many songs that are all kept, side by side.

    python -m tests.bench.bench_candidates_gpu [--songs 4] [--duration 300] [--in-flight 4] [--format mp3] [--tiny]

Full-size random weights, bfloat16, turbo with 8 steps. Requests with a ``batch_size`` and with as many ``candidates``,
of which one is kept, alternate in one process, whose encoders are processes of their own as in the worker. For each:
the seconds of a request alone, and with some in flight the songs made a minute, the device's seconds a song (its own
clock, decoding too) and the seconds of the renderer's process a song. ``--tiny`` tries the script out on a CPU.
"""

import argparse
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from acestep_consumer.audio.encoding.pool import EncoderPool
from acestep_consumer.config.cores import usable_cores
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Job, Plan, Sources
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.render import render
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.testing import tiny_checkpoint
from acestep_schemas.events import LimitsReport, Metas, ModelChoice, PolicyReport
from acestep_schemas.request import GenerationRequest
from tests.bench import full_size
from tests.bench.bench_renderer_gpu import LYRICS, PROMPT, tell

_LIMITS = LimitsReport(max_duration_s=600, max_batch_size=8)
_POLICY = PolicyReport(tier="unlimited", vram_gb=0, lm_loaded=False, table_version="bench", limits=_LIMITS)


@dataclass(frozen=True)
class Window:
    """One window: songs made a minute, seconds of the device and of this process a song."""

    rate: float
    device_s: float
    cpu_s: float


class Bench:
    """Makes requests for as many songs, all kept or the best of them."""

    def __init__(self, asked: argparse.Namespace, resources: RenderResources, folder: Path) -> None:
        self._asked = asked
        self._resources = resources
        self._folder = folder
        self._numbers = itertools.count(1)

    def request(self, *, best: bool) -> float:
        """Make one request; returns its seconds."""
        number, asked = next(self._numbers), self._asked
        fields: dict[str, Any] = {"candidates": asked.songs, "keep": 1} if best else {}
        body = GenerationRequest(
            prompt=PROMPT,
            lyrics=LYRICS,
            audio_duration=asked.duration,
            audio_format=asked.format,
            batch_size=asked.songs,
            **fields,
        )
        job = Job(
            task_id=str(number),
            request=body,
            model=ModelChoice(requested=None, used=tiny_checkpoint.TURBO, fallback=False),
            lm=None,
            policy=_POLICY,
            seeds=tuple(range(asked.songs * number, asked.songs * (number + 1))),
        )
        with TemporaryDirectory(dir=self._folder) as folder:
            plan, sources = Plan(metas=Metas()), Sources()
            message = Render(request_id=number, job=job, plan=plan, sources=sources, folder=Path(folder))
            began = time.perf_counter()
            made = render(self._resources, message, lambda *_: None, lambda: False)
            took = time.perf_counter() - began
        if len(made.tracks) != (1 if best else asked.songs):
            raise RuntimeError(f"{len(made.tracks)} songs: {made.warnings}")
        return took

    def window(self, *, best: bool) -> Window:
        """Keep so many requests in flight for so long."""
        done, stop, clock = itertools.count(), threading.Event(), self._resources.scheduler.clock

        def keep_asking() -> None:
            while not stop.is_set():
                self.request(best=best)
                next(done)

        threads = [threading.Thread(target=keep_asking, daemon=True) for _ in range(self._asked.in_flight)]
        for thread in threads:
            thread.start()
        time.sleep(self._asked.seconds / 3)
        before, busy, cpu, began = next(done), clock.busy_s, time.process_time(), time.perf_counter()
        time.sleep(self._asked.seconds)
        songs = max((next(done) - before - 1) * self._asked.songs, 1)
        took = time.perf_counter() - began
        found = Window(60 * songs / took, (clock.busy_s - busy) / songs, (time.process_time() - cpu) / songs)
        stop.set()
        for thread in threads:
            thread.join()
        return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=4, help="songs of a request (4)")
    parser.add_argument("--duration", type=int, default=300, help="seconds of a song (300)")
    parser.add_argument("--in-flight", type=int, default=4, help="requests at the same time (4)")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind (3)")
    parser.add_argument("--seconds", type=float, default=20, help="of a window (20)")
    parser.add_argument("--format", default="mp3", help="of the files (mp3)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    asked = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        measure(asked, Path(folder))


def measure(asked: argparse.Namespace, folder: Path) -> None:
    """Measure both kinds in turns, and print a line for each window."""
    if asked.tiny:
        tiny_checkpoint.write(folder)
    else:
        full_size.write(folder, tiny_checkpoint.TURBO)
    device = "cpu" if asked.tiny else "cuda"
    settings = EngineSettings(checkpoint_dir=folder, config_path=tiny_checkpoint.TURBO, device=device)
    scheduler = startup.open_runtime(settings, lambda step, _: tell(f"  {step}")).scheduler
    encoders = EncoderPool(usable_cores())
    encoders.start()
    bench = Bench(asked, RenderResources(scheduler, encoders=encoders), folder)
    try:
        for best in (False, True):
            bench.request(best=best)  # its kernels are loaded
        for best, name in ((False, "all kept"), (True, "the best")):
            tell(f"alone, {name}: {min(bench.request(best=best) for _ in range(3)):.2f} s")
        for _ in range(asked.rounds):
            for best, name in ((False, "all kept"), (True, "the best")):
                found = bench.window(best=best)
                tell(
                    f"{name}: {found.rate:6.1f} songs made a minute, device {1e3 * found.device_s:.1f} ms a song, "
                    f"renderer's process {1e3 * found.cpu_s:.0f} ms a song"
                )
    finally:
        encoders.close()


if __name__ == "__main__":
    main()
