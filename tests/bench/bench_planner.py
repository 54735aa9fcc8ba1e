# SPDX-License-Identifier: Apache-2.0
"""What the planner's process costs: the same plans through the process and in one's own, side by side.

The language model is the tiny one, on the CPU, with one thread. Rounds alternate; the medians and their difference for
each job are reported, with a line of JSON on standard output.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from acestep_consumer.domain.job import Job, Plan, Request
from acestep_consumer.engine.adapters import PlannerSupervisor
from acestep_consumer.engine.messages import ConfigurePlanner
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.loading import load
from acestep_consumer.engine.planner.planning import SongPlanner
from acestep_consumer.engine.testing import tiny_lm
from acestep_consumer.policy.admit import admit
from acestep_schemas.events import LmChoice
from acestep_schemas.request import parse_request
from tests.support.admission import make_limits

PlanJob = Callable[[Job], Awaitable[Plan]]


def make_job(seed: int) -> Job:
    """A ten-second song that thinks, with short thoughts."""
    fields = {"prompt": "jazz", "thinking": True, "audio_duration": 10, "seed": seed}
    body, _ = parse_request({**fields, "use_cot_caption": False, "use_cot_language": False})
    limits = replace(make_limits(), lm=LmChoice(model=tiny_lm.NAME, backend="pt"))
    return admit(Request(f"job-{seed}", body), limits)


async def round_of(plan: PlanJob, jobs: int) -> float:
    """Milliseconds a job, all of them in flight."""
    began = time.perf_counter()
    await asyncio.gather(*(plan(make_job(seed)) for seed in range(jobs)))
    return 1000 * (time.perf_counter() - began) / jobs


async def compare(folder: Path, jobs: int, rounds: int) -> dict[str, float]:
    """Medians of both ways, in milliseconds a job."""
    tiny_lm.write(folder)
    configure = ConfigurePlanner(
        model=tiny_lm.NAME, backend="pt", memory_gb=2, device="cpu", checkpoint_dir=folder, log_level="warning"
    )
    supervisor = PlannerSupervisor(configure, max_attempts=1)
    await supervisor.start()
    loaded = load(configure)
    engine_loop = EngineLoop(loaded.backend)
    stepping = asyncio.create_task(engine_loop.run())
    planner = SongPlanner(engine_loop, loaded.tokens)
    await planner.warm_up()
    ways: dict[str, PlanJob] = {
        "process": lambda job: supervisor.plan_songs(job, None, lambda *_: None),
        "in-process": lambda job: planner.plan(job, None, lambda *_: None),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, plan in ways.items():
            taken = await round_of(plan, jobs)
            if number:  # the first round warms up
                found[name].append(taken)
    stepping.cancel()
    with suppress(asyncio.CancelledError):
        await stepping
    await supervisor.stop()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(prog="bash infra/dev bench planner", description=__doc__)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for jobs in arguments.in_flight:
        with tempfile.TemporaryDirectory() as folder:
            medians = asyncio.run(compare(Path(folder), jobs, arguments.rounds))
        overhead = medians["process"] - medians["in-process"]
        print(  # noqa: T201 - a benchmark's result
            json.dumps(
                {"bench": "planner", "in_flight": jobs, "overhead_ms": round(overhead, 2)}
                | {name: round(value, 2) for name, value in medians.items()}
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
