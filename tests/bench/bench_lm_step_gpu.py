# SPDX-License-Identifier: Apache-2.0
"""One song alone in the language model: where a step's time goes, with and without NVIDIA's MPS.

    python -m tests.bench.bench_lm_step_gpu [--size 1.7B] [--songs 1 2] [--ways plain mps mps-idle] [--tokens 1500]

Random weights in full shapes, vLLM, our processor compiled as in the worker. Each way is a process of its own:
``plain``; ``mps``: as a client of a daemon that this script starts; ``mps-idle``: beside another client that has a
context and does nothing, as the renderer while one song is planned. For each number of songs (a guided song is two
rows) a line of JSON: milliseconds a step over whole songs; of profiled steps the time in which the device computes, its
gaps, and kernels a step; the longest kernels by name; and the host's parts. ``--tiny`` tries the script out where vLLM
has a CPU build.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from acestep_consumer.engine.cuda_mps import MpsDaemon
from tests.bench.bench_planner_gpu import Watch, _open_vllm, _song, _wait_for_device, _write_config

_STEPS = 100
_ON_DEVICE: Any = vars(torch.autograd)["DeviceType"].CUDA
_KERNELS = 14
_IDLE = "import torch, sys; torch.zeros(1, device='cuda'); print('up', flush=True); sys.stdin.read()"


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.child:
        child(arguments)
        return 0
    return asyncio.run(parent(arguments))


async def parent(arguments: argparse.Namespace) -> int:
    """Run each way in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_lm_step_gpu", "--child", *sys.argv[1:], "--ways"]
    failed = 0
    for way in arguments.ways:
        daemon, idle = None, None
        environment = dict(os.environ)
        if way != "plain":
            daemon = MpsDaemon()
            await daemon.start()
            environment |= daemon.environment
        if way == "mps-idle":
            program = (sys.executable, "-c", _IDLE)
            idle = await asyncio.create_subprocess_exec(*program, env=environment, stdin=PIPE, stdout=PIPE)
            assert idle.stdout is not None
            await idle.stdout.readline()
        try:
            done = await asyncio.create_subprocess_exec(*command, way, env=environment)
            failed += await done.wait() != 0
        finally:
            if idle is not None:
                await idle.communicate()
            if daemon is not None:
                await daemon.stop()
    return int(failed > 0)


def child(arguments: argparse.Namespace) -> None:
    """Measure one way."""
    (way,) = arguments.ways
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"in_flight": arguments.songs, "context": 8192, "compiled": not arguments.tiny}
        settings = argparse.Namespace(memory_gb=arguments.memory_gb, int8=arguments.int8, **fixed)
        size = "tiny" if arguments.tiny else arguments.size
        backend = _open_vllm(_write_config(Path(folder), size), size, settings).backend
        for songs in arguments.songs:
            whole(backend, songs, 60)
            ms = whole(backend, songs, arguments.tokens)
            tell(way=way, songs=songs, **ms, **profiled(backend, songs))
    sys.stdout.flush()
    os._exit(0)


def tell(**found: Any) -> None:
    sys.stdout.write(json.dumps({"bench": "lm-step", **found}) + "\n")
    sys.stdout.flush()


def add(backend: Any, songs: int, tokens: int) -> None:
    source = random.Random(songs)  # noqa: S311 - no secret
    for seed in range(songs):
        backend.add(seed, _song(source, seed, tokens))


def whole(backend: Any, songs: int, tokens: int) -> dict[str, float]:
    """Milliseconds a step of whole songs: on average, and of the middle one as the host sees them."""
    add(backend, songs, tokens)
    steps = []
    _wait_for_device()
    began = last = time.perf_counter()
    while not backend.idle:
        backend.step()
        steps.append(time.perf_counter() - last)
        last += steps[-1]
    _wait_for_device()
    seconds = time.perf_counter() - began
    return {"song_s": round(seconds, 3), "ms": ms_of(seconds / tokens), "median_ms": ms_of(statistics.median(steps))}


def profiled(backend: Any, songs: int) -> dict[str, Any]:
    """Steps in the middle of a song: first the host's parts, then what the device does."""
    add(backend, songs, 3 * _STEPS + 60)
    for _ in range(50):
        backend.step()
    with Watch(backend) as watch:
        backend.step()
        watch.reset()
        for _ in range(_STEPS):
            backend.step()
        _wait_for_device()
        host = {name.strip(): round(ms, 3) for name, ms in watch.per_step(_STEPS).items()}
    activities = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        began = time.perf_counter()
        for _ in range(_STEPS):
            backend.step()
        _wait_for_device()
        seconds = time.perf_counter() - began
    for seed in range(songs):
        backend.drop(seed)
    return {"host_ms": host, "profiled_ms": ms_of(seconds / _STEPS), **device(found.events())}


def device(events: Iterable[Any]) -> dict[str, Any]:
    """What the device did in the profiled steps, each."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == _ON_DEVICE
    )
    if not kernels:
        return {}
    busy = gaps = long_gaps = 0.0
    end = kernels[0][0]
    by_name: dict[str, list[float]] = defaultdict(list)
    for start, stop, name in kernels:
        by_name[name].append(stop - start)
        gaps += max(0.0, start - end)
        long_gaps += start - end if start - end > 20 else 0.0
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_KERNELS]
    return {
        "busy_ms": ms_of(busy / 1e6 / _STEPS),
        "gaps_ms": ms_of(gaps / 1e6 / _STEPS),
        "gaps_over_20_us_ms": ms_of(long_gaps / 1e6 / _STEPS),
        "kernels": round(len(kernels) / _STEPS, 1),
        "longest": {
            name[:70]: {"us": round(sum(times) / _STEPS, 1), "times": round(len(times) / _STEPS, 1)}
            for name, times in longest
        },
    }


def ms_of(seconds: float) -> float:
    return round(1000 * seconds, 4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7B")
    parser.add_argument("--songs", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=("plain", "mps", "mps-idle"), default=["plain", "mps", "mps-idle"])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--memory-gb", type=float, default=40.0)
    parser.add_argument("--int8", action="store_true", help="weights in int8, by torchao")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
