# SPDX-License-Identifier: Apache-2.0
"""Songs a minute that the language model plans on a GPU: the vLLM backend, vLLM's own means, and transformers.

Weights are random, of the full shapes: what they say does not matter for how long it takes. Every song is 300 seconds,
1,500 codes, guided, with a prompt of 300 tokens and one of 200; ``--tokens`` writes less of each and scales up, which
flatters no one but leaves out the last two thirds of a growing cache. Needs neither network nor tokenizer.

Every model and contender has a process of its own, since an engine does not give all its memory back. A table goes to
standard error, a line of JSON for each result to standard output. ``--profile`` tells where a step's time goes instead,
``--check`` whether the backend keeps its word on this machine (pairs in step, grammar held), and ``--sizes tiny`` tries
the benchmark itself out, with a toy model on a CPU.

Run: ``python -m tests.bench.bench_planner_gpu --sizes 1.7B --in-flight 1 4 16 64``
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from acestep_consumer.engine.planner.backend import (
    Backend,
    CodeConstraint,
    Generation,
    Sampling,
    SequenceOutput,
    TextConstraint,
)
from acestep_consumer.engine.renderer.quantization import config_json, quantize

SONG_CODES = 1500
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 217_204,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "torch_dtype": "float32",
    },
}  # fmt: skip
_CODES = range(151_669, 151_669 + 64_000)
_CONTENDERS = ("vllm", "stock", "pt")
_GRAMMAR = 'root ::= "bpm: " [1-9] [0-9] [0-9]? "\\nkey: " [A-G] ("#" | "b")? " " ("major" | "minor") "\\n"'
_PROFILED_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One measurement: ``in_flight`` songs of ``tokens`` codes together. Times in seconds, memory in 10⁹ bytes."""

    size: str
    contender: str
    in_flight: int
    tokens: int
    seconds: float
    songs_per_minute: float
    ms_per_step: float
    first_token_s: float
    first_token_worst_s: float
    device_gb: float
    cache_gb: float


def main() -> int:
    """Run what was asked for, each in a process of its own."""
    arguments = _parser().parse_args()
    if arguments.alone:
        return _alone(arguments)
    laps: list[dict[str, Any]] = []
    failed = 0
    for size in arguments.sizes:
        for contender in arguments.contenders:
            child = [sys.executable, "-m", "tests.bench.bench_planner_gpu", *sys.argv[1:], "--alone"]
            child += ["--sizes", size, "--contenders", contender]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=False)
            sys.stdout.write(done.stdout)
            sys.stdout.flush()
            failed += done.returncode != 0
            laps += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"size"')]
    if laps:
        _print_table(laps)
    return 1 if failed else 0


def _alone(arguments: argparse.Namespace) -> int:
    contender, size = arguments.contenders[0], arguments.sizes[0]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.check:
            return check(Path(folder), arguments)
        arena = _OPEN[contender](_write_config(Path(folder), size), size, arguments)
        run(arena, 1, min(20, arguments.tokens))  # the first song pays for what is made once
        if arguments.profile:
            profile(arena, arguments)
            return 0
        for in_flight in arguments.in_flight:
            lap = measure(arena, size, contender, in_flight, arguments.tokens)
            print(json.dumps({name: getattr(lap, name) for name in Lap.__slots__}), flush=True)  # noqa: T201 - the result
    return 0


def measure(arena: "Arena | StockArena", size: str, contender: str, in_flight: int, tokens: int) -> Lap:
    """Write some songs together and take the time."""
    seconds, firsts = run(arena, in_flight, tokens)
    whole = seconds * SONG_CODES / tokens
    cuda = torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    return Lap(
        size=size,
        contender=contender,
        in_flight=in_flight,
        tokens=tokens,
        seconds=round(seconds, 3),
        songs_per_minute=round(60 * in_flight / whole, 2),
        ms_per_step=round(1000 * seconds / tokens, 3),
        first_token_s=round(statistics.median(firsts), 4) if firsts else -1,
        first_token_worst_s=round(max(firsts), 4) if firsts else -1,
        device_gb=round((total - free) / 1e9, 2),
        cache_gb=round(in_flight * (500 + 2 * tokens) * _token_bytes(size) / 1e9, 2),
    )


class Arena:
    """A backend that songs are written on."""

    def __init__(self, backend: Backend, codes: range) -> None:
        self.backend = backend
        self.codes = codes

    def write(self, songs: Sequence[Generation]) -> Iterator[int]:
        """Write them all; yield each one's number at its first token."""
        waiting = set(range(len(songs)))
        for number, song in enumerate(songs):
            self.backend.add(number, song)
        while not self.backend.idle:
            for news in self.backend.step():
                if news.error or news.out_of_step:
                    raise RuntimeError(f"song {news.sequence_id}: {news}")
                if news.sequence_id in waiting:
                    waiting.remove(news.sequence_id)
                    yield news.sequence_id


class StockArena:
    """vLLM's engine, driven without the backend; it has no news of first tokens."""

    def __init__(self, engine: Any, codes: range) -> None:
        self.engine = engine
        self.codes = codes

    def write(self, songs: Sequence[Generation]) -> Iterator[int]:
        """Write them all."""
        from tests.bench.contenders.vllm_stock import submit  # noqa: PLC0415 - needs vLLM

        for number, song in enumerate(songs):
            submit(self.engine, number, song, self.codes)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return iter(())


def run(arena: "Arena | StockArena", in_flight: int, tokens: int) -> tuple[float, list[float]]:
    """Write songs; return the seconds it took, and after how many each had its first token."""
    source = random.Random(in_flight)  # noqa: S311 - no secret
    songs = [_song(source, seed, tokens) for seed in range(in_flight)]
    _wait_for_device()
    began = time.perf_counter()
    firsts = [time.perf_counter() - began for _ in arena.write(songs)]
    _wait_for_device()
    return time.perf_counter() - began, firsts


def _song(source: random.Random, seed: int, tokens: int) -> Generation:
    prompt = tuple(source.choices(range(5, 150_000), k=300))
    return Generation(
        prompt=prompt,
        unconditional=prompt[:200],
        constraint=CodeConstraint(tokens),
        sampling=Sampling(seed=seed, temperature=0.85, top_p=0.9, cfg_scale=2.5),
    )


def _open_vllm(folder: Path, size: str, arguments: argparse.Namespace) -> Arena:
    from acestep_consumer.engine.planner.vllm_backend import open_vllm  # noqa: PLC0415 - needs vLLM

    options = {**_options(size), "compiled": arguments.compiled}
    if arguments.int8:
        options["torchao"] = config_json()
    return Arena(open_vllm(str(folder), None, _CODES, _engine_size(arguments), **options), _CODES)


def _open_stock(folder: Path, size: str, arguments: argparse.Namespace) -> StockArena:
    from acestep_consumer.engine.planner import vllm_engine  # noqa: PLC0415 - needs vLLM

    vllm_engine.prepare()
    from tests.bench.contenders.vllm_stock import StockGuidance  # noqa: PLC0415 - needs vLLM, prepared

    engine = vllm_engine.start(str(folder), StockGuidance, _engine_size(arguments), **_options(size))
    return StockArena(engine._engine, _CODES)


def _open_pt(folder: Path, size: str, arguments: argparse.Namespace) -> Arena:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - as long as the others' imports

    from acestep_consumer.engine.planner.transformers_backend import TransformersBackend  # noqa: PLC0415
    from acestep_consumer.engine.testing.tiny_lm import make_tokenizer  # noqa: PLC0415

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape_of(size)["torch_dtype"])).eval()
    quantize(model.requires_grad_(requires_grad=False), "int8" if arguments.int8 else None)
    room = int(arguments.memory_gb * 1e9 / 2 / _token_bytes(size))
    return Arena(TransformersBackend(model, make_tokenizer(), _CODES, cache_tokens=room), _CODES)


_OPEN: Mapping[str, Callable[[Path, str, argparse.Namespace], Any]] = {
    "vllm": _open_vllm,
    "stock": _open_stock,
    "pt": _open_pt,
}


def _engine_size(arguments: argparse.Namespace) -> Any:
    from acestep_consumer.engine.planner.vllm_engine import EngineSize  # noqa: PLC0415 - needs torch only, but belongs to vLLM

    return EngineSize(memory_gb=arguments.memory_gb, rows=2 * max(arguments.in_flight), context=arguments.context)


def _options(size: str) -> dict[str, Any]:
    return {"load_format": "dummy", "dtype": shape_of(size)["torch_dtype"], "seed": 0}


def profile(arena: Arena, arguments: argparse.Namespace) -> None:
    """Say where a step's time goes, at each number of songs in flight: on the host by part, on the device by kernel."""
    for in_flight in arguments.in_flight:
        source = random.Random(in_flight)  # noqa: S311 - no secret
        for seed in range(in_flight):
            arena.backend.add(seed, _song(source, seed, 4 * _PROFILED_STEPS))
        with Watch(arena.backend) as watch:
            for _ in range(_PROFILED_STEPS):  # prompts, and what is made once
                arena.backend.step()
            watch.reset()
            _wait_for_device()
            began = time.perf_counter()
            for _ in range(_PROFILED_STEPS):
                arena.backend.step()
            _wait_for_device()
            wall = 1000 * (time.perf_counter() - began) / _PROFILED_STEPS
            _say(f"\n== {in_flight} songs in flight: {wall:.3f} ms a step ==")
            for part, ms in watch.per_step(_PROFILED_STEPS).items():
                _say(f"  {part:<58} {ms:8.3f} ms")
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(_PROFILED_STEPS):
                arena.backend.step()
            _wait_for_device()
        averages = profiler.key_averages()
        for order in ("self_cuda_time_total", "self_cpu_time_total")[0 if torch.cuda.is_available() else 1 :]:
            _say(averages.table(sort_by=order, row_limit=25, max_name_column_width=70))
        for seed in range(in_flight):
            arena.backend.drop(seed)


class Watch:
    """Takes the time of the parts of a step while it is entered: on the host, and of our processor on the device."""

    def __init__(self, backend: Any) -> None:
        from acestep_consumer.engine.planner.vllm_guidance import GuidanceProcessor  # noqa: PLC0415 - needs vLLM

        engine = backend._engine._engine
        core = engine.engine_core.engine_core
        batch = core.model_executor.driver_worker.worker.model_runner.input_batch
        self._parts: list[tuple[str, Any, str]] = [
            ("vLLM's step, all of it", engine, "step"),
            ("  scheduler: what runs next", core.scheduler, "schedule"),
            ("  runner: prepare and launch the model", core.model_executor, "execute_model"),
            ("  runner: sampling, launched (with the next two)", core.model_executor, "sample_tokens"),
            ("    waiting for the last step's tokens", batch, "update_async_output_token_ids"),
            ("    our processor, launched", GuidanceProcessor, "apply"),
            ("  scheduler: take the tokens", core.scheduler, "update_from_output"),
            ("  outputs for the caller", engine.output_processor, "process_outputs"),
        ]
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[Any, Any]] = []
        self._before: list[tuple[Any, str, Any, bool]] = []

    def __enter__(self) -> Self:
        """Put a clock around each part that this version of vLLM has."""
        for label, owner, name in self._parts:
            function = getattr(owner, name, None)
            if function is not None:
                self._before.append((owner, name, function, name in vars(owner)))
                setattr(owner, name, self._clocked(label, function, on_device=name == "apply"))
        return self

    def __exit__(self, *_: object) -> None:
        """Take the clocks away."""
        for owner, name, function, own in reversed(self._before):
            if own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)

    def reset(self) -> None:
        """Forget what has been measured."""
        self._seconds.clear()
        self._events.clear()

    def per_step(self, steps: int) -> dict[str, float]:
        """Milliseconds of each part."""
        told = {label: 1000 * self._seconds[label] / steps for label, _, _ in self._parts if label in self._seconds}
        if self._events:
            told["our processor, on the device"] = sum(a.elapsed_time(b) for a, b in self._events) / steps
        return told

    def _clocked(self, label: str, function: Any, *, on_device: bool) -> Any:
        def clocked(*arguments: Any, **named: Any) -> Any:
            events: list[Any] = []
            if on_device and _cuda():
                events += (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began = time.perf_counter()
            for event in events[:1]:
                event.record()
            try:
                return function(*arguments, **named)
            finally:
                for event in events[1:]:
                    event.record()
                    self._events.append((events[0], event))
                self._seconds[label] = self._seconds.get(label, 0.0) + time.perf_counter() - began

        return clocked


def check(folder: Path, arguments: argparse.Namespace) -> int:
    """Codes and texts of the tiny model, many together, joining at odd times: pairs in step and grammar held."""
    from acestep_consumer.engine.planner.tokens import LmTokens  # noqa: PLC0415
    from acestep_consumer.engine.planner.vllm_backend import open_vllm  # noqa: PLC0415
    from acestep_consumer.engine.testing import tiny_lm  # noqa: PLC0415 - needs transformers

    model = tiny_lm.write(folder)
    tokens = LmTokens.load(model)
    codes = range(tokens.first_code, tokens.first_code + tokens.code_count)
    dtype = "bfloat16" if _cuda() else "float32"
    backend = open_vllm(str(model), tokens.tokenizer, codes, _engine_size(arguments), dtype=dtype)
    source = random.Random(0)  # noqa: S311 - no secret
    wanted = {}
    for number in range(40):
        prompt = tuple(source.choices(range(250), k=source.randrange(5, 200)))
        constraint = TextConstraint(_GRAMMAR, 60) if number % 3 == 0 else CodeConstraint(source.randrange(1, 200))
        sampling = Sampling(seed=number, cfg_scale=2.0, top_p=0.9, repetition_penalty=1.1 if number % 5 == 0 else 1.0)
        wanted[number] = Generation(prompt=prompt, unconditional=prompt[:3], constraint=constraint, sampling=sampling)
    last: dict[int, SequenceOutput] = {}
    queue = list(wanted)
    while queue or not backend.idle:
        for number in queue[: source.randrange(3)]:
            backend.add(number, wanted[number])
            queue.remove(number)
        last.update((news.sequence_id, news) for news in backend.step())
    bad = [news for number, news in last.items() if not _kept(news.tokens, wanted[number], codes, tokens)]
    _say(
        f"check: {len(last) - len(bad)} of {len(wanted)} as they should be; asynchronous: {backend._engine.ahead == 1}"
    )
    for news in bad:
        _say(f"  {news}")
    return 1 if bad or len(last) != len(wanted) else 0


def _kept(written: tuple[int, ...] | None, generation: Generation, codes: range, tokens: Any) -> bool:
    if written is None:
        return False
    if isinstance(generation.constraint, CodeConstraint):
        return len(written) == generation.constraint.count and all(token in codes for token in written)
    return re.fullmatch(r"bpm: [1-9]\d{1,2}\nkey: [A-G][#b]? (major|minor)\n", tokens.decode(written)) is not None


def shape_of(size: str) -> dict[str, Any]:
    """Return the configuration of a Qwen3 of this size."""
    return {**_QWEN3, **_SHAPES[size]}


def _token_bytes(size: str) -> int:
    """Keys and values of one token of one sequence."""
    shape = shape_of(size)
    width = 4 if shape["torch_dtype"] == "float32" else 2
    return int(2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * width)


def _write_config(folder: Path, size: str) -> Path:
    (folder / "config.json").write_text(json.dumps(shape_of(size)), encoding="utf-8")
    return folder


def _cuda() -> bool:
    return torch.cuda.is_available()


def _wait_for_device() -> None:
    if _cuda():
        torch.cuda.synchronize()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - for the person who runs it


def _print_table(laps: Sequence[Mapping[str, Any]]) -> None:
    names = (
        "size",
        "contender",
        "in_flight",
        "songs_per_minute",
        "ms_per_step",
        "first_token_s",
        "device_gb",
        "cache_gb",
    )
    _say("".join(f"{name:>18}" for name in names))
    for lap in laps:
        _say("".join(f"{lap[name]:>18}" for name in names))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(_SHAPES), default=["1.7B"])
    parser.add_argument("--contenders", nargs="+", choices=_CONTENDERS, default=["vllm"])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=SONG_CODES, help="codes of each song")
    parser.add_argument("--memory-gb", type=float, default=60.0, help="for weights and cache; on a CPU the cache alone")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--compiled", action="store_true", help="torch.compile for guidance and draw of the backend")
    parser.add_argument("--int8", action="store_true", help="weights in int8, by torchao")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
