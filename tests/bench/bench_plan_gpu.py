# SPDX-License-Identifier: Apache-2.0
"""Songs a minute through the planner process on a GPU: pipe, tokenizer, grammar, guidance and vLLM together.

The language model has the full shapes and random weights, with the tiny model's tokenizer; thoughts are kept short, so
that the figure is that of 300-second songs' codes. A line of JSON for each number of jobs in flight.

Run: ``python -m tests.bench.bench_plan_gpu --size 1.7B --in-flight 1 4 16 64``
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from acestep_consumer.domain.job import Job, Request
from acestep_consumer.engine.adapters import PlannerSupervisor
from acestep_consumer.engine.messages import ConfigurePlanner
from acestep_consumer.engine.testing.tiny_lm import make_tokenizer
from acestep_consumer.policy.admit import admit
from acestep_schemas.events import LmChoice
from acestep_schemas.request import parse_request
from tests.bench.bench_planner_gpu import shape_of
from tests.support.admission import make_limits

SECONDS = 300
_NOT_SHAPE = ("architectures", "model_type", "torch_dtype")


def write_model(folder: Path, size: str) -> None:
    """Write random weights of the full shapes, and a tokenizer."""
    shape = {name: value for name, value in shape_of(size).items() if name not in _NOT_SHAPE}
    config = Qwen3Config(**shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    tokenizer = make_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def make_job(seed: int) -> Job:
    """A song that thinks, with everything but its codes given."""
    fields = {"prompt": "upbeat electronic dance music", "lyrics": "la la la\n" * 12, "audio_duration": SECONDS}
    given = {"bpm": 120, "key_scale": "C major", "time_signature": "4", "vocal_language": "en", "seed": seed}
    body, _ = parse_request({**fields, **given, "thinking": True, "use_cot_caption": False})
    limits = replace(make_limits(140), lm=LmChoice(model="lm", backend="vllm"))
    return admit(Request(f"job-{seed}", body), limits)


async def lap(planner: PlannerSupervisor, jobs: int) -> dict[str, float]:
    """Plan ``jobs`` songs at once."""
    began = time.perf_counter()
    firsts: list[float] = []

    async def one(seed: int) -> None:
        started = False

        def report(fraction: float, _: str) -> None:
            nonlocal started
            if fraction > 0.1 and not started:
                started = True
                firsts.append(time.perf_counter() - began)

        await planner.plan_songs(make_job(seed), None, report)

    await asyncio.gather(*(one(seed) for seed in range(jobs)))
    seconds = time.perf_counter() - began
    return {
        "in_flight": jobs,
        "seconds": round(seconds, 2),
        "songs_per_minute": round(60 * jobs / seconds, 2),
        "first_code_s": round(min(firsts), 3),
    }


async def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Start the process and run the laps."""
    configure = ConfigurePlanner(
        model=str(folder), backend="vllm", memory_gb=arguments.memory_gb, device="cuda", log_level="warning"
    )
    planner = PlannerSupervisor(configure, max_attempts=1)
    began = time.perf_counter()
    await planner.start()
    sys.stderr.write(f"ready after {time.perf_counter() - began:.1f} s\n")
    await lap(planner, 2)
    for jobs in arguments.in_flight:
        sys.stdout.write(json.dumps({"bench": "plan", "size": arguments.size, **await lap(planner, jobs)}) + "\n")
        sys.stdout.flush()
    await planner.stop()


def main() -> int:
    """Write the model, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.7B")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--memory-gb", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.size)
        asyncio.run(measure(Path(folder), arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
