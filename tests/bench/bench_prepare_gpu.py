# SPDX-License-Identifier: Apache-2.0
"""Preparing songs on a GPU: milliseconds a song, and the kernels that it launches, by where they come from.

    python -m tests.bench.bench_prepare_gpu [--seconds 300] [--songs 1 4 16] [--tiny]

Full-size random weights, turbo. A song has codes, a prompt and lyrics of its own, as from the language model. The time
is that of the device's thread, from prepared request to sample, with nothing else on the GPU; the profile counts
launches of kernels and of graphs, and names the parts of our code. ``--tiny`` tries the script out on a CPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.code_latents import CodeLatents
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.source import SourceEncoder
from acestep_consumer.engine.renderer.text_encoder import TextEncoder
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.bench import full_size
from tests.bench.bench_renderer_gpu import arguments

_PARTS = (
    (TextEncoder, "_encode_batch"),
    (CodeLatents, "_looked_up"),
    (PackedDit, "conditions"),
    (SourceEncoder, "encode"),
)
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--songs", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        if given.tiny:
            tiny_checkpoint.write(Path(folder))
        else:
            full_size.write(Path(folder))
        device = "cpu" if given.tiny else "cuda"
        began = time.perf_counter()
        scheduler = startup.open_runtime(EngineSettings(checkpoint_dir=Path(folder), device=device)).scheduler
        tell(start_s=time.perf_counter() - began)
        (runner,) = scheduler._runners.values()
        for songs in given.songs:
            scheduler.run_on_device(partial(measure, runner, songs, 10 if given.tiny else given.seconds))
    return 0


def tell(**found: Any) -> None:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    sys.stdout.write(json.dumps({"bench": "prepare", **rounded}) + "\n")
    sys.stdout.flush()


def measure(runner: ModelRunner, songs: int, seconds: int, rounds: int = 12) -> None:
    """Prepare so many songs together, again and again."""
    host, whole = [], []
    for number in range(rounds):
        requests = [runner.preparer.prepare(arguments(seconds, 100 * number + song)) for song in range(songs)]
        wait()
        began = time.perf_counter()
        made = runner.samples(requests, None)
        host.append(1000 * (time.perf_counter() - began) / songs)
        wait()
        whole.append(1000 * (time.perf_counter() - began) / songs)
        assert not any(isinstance(each, Exception) for each in made), made
    tell(songs=songs, host_ms=statistics.median(host[2:]), whole_ms=statistics.median(whole[2:]), first_ms=whole[0])
    requests = [runner.preparer.prepare(arguments(seconds, song)) for song in range(songs)]
    before = [(owner, name, vars(owner)[name]) for owner, name in _PARTS]
    for owner, name, function in before:
        setattr(owner, name, marked(function, f"{owner.__name__}.{name}"))
    try:
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        ) as found:
            runner.samples(requests, None)
            wait()
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    launches, parts = Counter[str](), Counter[str]()
    for event in found.events():
        kind = next((kind for kind in _LAUNCHES if kind in event.name), None)
        if kind is not None:
            launches[kind] += 1
            parts[part_of(event)] += 1
    tell(songs=songs, launches=dict(launches), launches_by_part=dict(parts))


def marked(function: Any, name: str) -> Any:
    def run(*given: Any, **named: Any) -> Any:
        with record_function(name):
            result = function(*given, **named)
            return list(result) if hasattr(result, "__next__") else result

    return run


def part_of(event: Any) -> str:
    """Return the part of our code in which something was launched."""
    names = {f"{owner.__name__}.{name}" for owner, name in _PARTS}
    while event is not None and event.name not in names:
        event = event.cpu_parent
    return "rest" if event is None else str(event.name)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
