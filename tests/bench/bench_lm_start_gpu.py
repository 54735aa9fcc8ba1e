# SPDX-License-Identifier: Apache-2.0
"""Where the start of the language model takes its time on a GPU, and what memory it ends up with.

    python -m tests.bench.bench_lm_start_gpu [--size 1.7B] [--memory-gb 55] [--rounds 3]

Random weights in full shapes, written once. Each start is a process of its own: first with vLLM's own measurement of
memory, as beside a renderer that has finished, then with the one of this process alone, as beside a renderer that is
loading. The first round finds no compiled kernels, later ones do. Lines of JSON on standard output: seconds of each
part (parts inside others have dots before them), the packages that take longest to import, and bytes on the device.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_BORN = time.perf_counter()
_SLOW_IMPORTS = 25
_LEAST_IMPORT_S = 0.15


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.child:
        child(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "kernels"
        write = [sys.executable, "-m", "tests.bench.bench_lm_start_gpu", "--child", "write", "--size", arguments.size]
        model = str(Path(folder) / "model")
        subprocess.run([*write, "--model", model], check=True)
        imports()
        failed = 0
        for number in range(arguments.rounds):
            for way in ("own", "device") if number else ("device", "own"):
                command = [sys.executable, "-m", "tests.bench.bench_lm_start_gpu", "--child", way, "--model", model]
                command += ["--memory-gb", str(arguments.memory_gb), "--cache", str(cache)]
                began = time.perf_counter()
                done = subprocess.run(command, check=False)
                tell(process=way, round=number, whole_s=time.perf_counter() - began, exit=done.returncode)
                failed += done.returncode != 0
    return int(failed > 0)


def tell(**found: Any) -> None:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    sys.stdout.write(json.dumps({"bench": "lm-start", **rounded}) + "\n")
    sys.stdout.flush()


def imports() -> None:
    """Tell which packages take longest: with what they import, and by themselves."""
    code = "import acestep_consumer.engine.planner.loading; import vllm; import vllm.v1.engine.llm_engine"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False)
    found = []
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and len(parts) == 3 and parts[1].strip().isdecimal():
            found.append((int(parts[1]) / 1e6, int(parts[0]) / 1e6, parts[2].strip()))
    slow = sorted((each for each in found if each[0] >= _LEAST_IMPORT_S), reverse=True)[:_SLOW_IMPORTS]
    tell(imports={name: [round(whole, 2), round(own, 2)] for whole, own, name in slow}, exit=done.returncode)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])


def child(arguments: argparse.Namespace) -> None:
    if arguments.child == "write":
        from tests.bench.bench_plan_gpu import write_model  # noqa: PLC0415 - a process of its own

        write_model(Path(arguments.model), arguments.size)
        return
    from acestep_consumer.engine.kernel_cache import set_kernel_cache  # noqa: PLC0415 - as the planner does

    set_kernel_cache(Path(arguments.cache))
    start(arguments)


def start(arguments: argparse.Namespace) -> None:
    """Start as the planner does, with a clock at each part."""
    parts: dict[str, float] = {"python and torch": time.perf_counter() - _BORN}
    with clocked(parts, "imports"):
        from acestep_consumer.engine.messages import ConfigurePlanner  # noqa: PLC0415 - timed
        from acestep_consumer.engine.planner.engine_loop import EngineLoop  # noqa: PLC0415 - timed
        from acestep_consumer.engine.planner.loading import import_backend, load  # noqa: PLC0415 - timed
        from acestep_consumer.engine.planner.planning import SongPlanner  # noqa: PLC0415 - timed

        configure = ConfigurePlanner(
            model=arguments.model,
            backend="vllm",
            memory_gb=arguments.memory_gb,
            device="cuda",
            beside=arguments.child == "own",
        )
        import_backend(configure)
    watch(parts)
    with clocked(parts, "load"):
        loaded = load(configure)
    with clocked(parts, "warm-up"):
        import asyncio  # noqa: PLC0415 - here alone

        async def warm_up() -> None:
            loop = EngineLoop(loaded.backend)
            stepping = asyncio.create_task(loop.run())
            await SongPlanner(loop, loaded.tokens).warm_up()
            stepping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stepping

        asyncio.run(warm_up())
    free, total = torch.cuda.mem_get_info()
    budget = loaded.backend._budget  # type: ignore[attr-defined]  # vLLM's
    tell(way=arguments.child, parts={name: round(seconds, 2) for name, seconds in parts.items()})
    tell(
        way=arguments.child,
        share_gb=arguments.memory_gb,
        used_gb=(total - free) / 1e9,
        torch_reserved_gb=torch.cuda.memory_reserved() / 1e9,
        cache_tokens=budget.blocks * budget.block,
        rows=budget.rows,
    )
    sys.stdout.flush()
    os._exit(0)


@contextlib.contextmanager
def clocked(parts: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    parts[name] = parts.get(name, 0.0) + time.perf_counter() - began


def watch(parts: dict[str, float]) -> None:
    """Put a clock on what happens inside vLLM."""
    from vllm.v1.worker import gpu_model_runner, gpu_worker  # noqa: PLC0415 - after its preparation

    from acestep_consumer.engine.planner import vllm_worker  # noqa: PLC0415 - as above
    from acestep_consumer.engine.planner.tokens import LmTokens  # noqa: PLC0415 - as above

    worker, runner = gpu_worker.Worker, gpu_model_runner.GPUModelRunner
    of_worker = (
        "init_device", "load_model", "determine_available_memory", "initialize_from_config", "compile_or_warm_up_model",
    )  # fmt: skip
    of_runner = ("profile_run", "profile_cudagraph_memory", "capture_model", "_dummy_sampler_run")
    for owner, names in ((worker, of_worker), (runner, of_runner)):
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, timed(getattr(owner, name), parts, f". {name}"))
    if hasattr(gpu_worker, "kernel_warmup"):
        vars(gpu_worker)["kernel_warmup"] = timed(gpu_worker.kernel_warmup, parts, ". . kernel_warmup")
    own: Any = vllm_worker.OwnMemoryWorker
    own.determine_available_memory = timed(own.determine_available_memory, parts, ". determine_available_memory")
    tokens: Any = LmTokens
    tokens.load = classmethod(timed(vars(LmTokens)["load"].__func__, parts, ". tokenizer"))


def timed(function: Callable[..., Any], parts: dict[str, float], name: str) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        with clocked(parts, name):
            return function(*arguments, **named)

    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7B")
    parser.add_argument("--memory-gb", type=float, default=55)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=("write", "own", "device"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
