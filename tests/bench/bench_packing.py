# SPDX-License-Identifier: Apache-2.0
"""What packing costs where it gains least: the same songs together and one by one, on the CPU, with the tiny model.

A GPU is busy only when a pass is large, and there packing is what makes it so (`bench renderer_gpu` measures that). A
CPU core is always busy; so here the question is whether joining, splitting and attending song by song cost more than
fewer calls save. Both ways go through the same scheduler in turns, in one process on one thread. "Together" hands over
all jobs at one moment, "one by one" each job when the one before it is done. Rounds alternate, which of the two comes
first as well; each round gives one ratio, and the median counts. Sound is not made, because tiles of the VAE are no
part of packing. A table goes to standard error, one line of JSON to standard output.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.support.scheduler_harness import SchedulerHarness, open_runners, render_message

GOAL = 1.0
_SECONDS = (30, 12, 45, 20, 8, 60, 15, 25)

Way = Callable[[], None]


class SilentRunner(ModelRunner):
    """A runner that skips the VAE decode."""

    def decode(self, samples: Sequence[Sample], tiles_at_once: int) -> list[torch.Tensor]:
        """Return silence, [2, 1] for each song."""
        return [torch.zeros(2, 1)] * len(samples)


def main() -> int:
    """Run the benchmark. Returns 1 when packing was slower."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    found = {model: _measured(model, arguments) for model in (tiny_checkpoint.TURBO, tiny_checkpoint.BASE)}
    for model, row in found.items():
        _say(
            f"{model}, {arguments.jobs} jobs: {row['together_s']:.3f} s together, {row['one_by_one_s']:.3f} s alone; "
            f"{row['ratio']:.2f} times as fast ({row['least']:.2f} to {row['most']:.2f})"
        )
    report = {"bench": "packing", "jobs": arguments.jobs, "rounds": arguments.rounds, "load": round(load, 2), **found}
    sys.stdout.write(json.dumps(report) + "\n")
    return int(any(row["ratio"] < GOAL for row in found.values()))


def _measured(model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the medians of both ways, in seconds, and of the rounds' ratios."""
    with tempfile.TemporaryDirectory(prefix="acestep-") as folder:
        tiny_checkpoint.write(Path(folder))
        runners: dict[str, ModelRunner] = {
            name: SilentRunner(runner.parts) for name, runner in open_runners(Path(folder)).items()
        }
    harness = SchedulerHarness(runners)
    messages = _messages(model, arguments)
    ways: tuple[Way, Way] = (lambda: _together(harness, messages), lambda: _one_by_one(harness, messages))
    taken = [_round(ways, turned=bool(number % 2)) for number in range(arguments.rounds + 1)][1:]  # the first warms up
    ratios = [alone / packed for packed, alone in taken]
    return {
        "together_s": round(statistics.median(packed for packed, _ in taken), 4),
        "one_by_one_s": round(statistics.median(alone for _, alone in taken), 4),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    }


def _messages(model: str, arguments: argparse.Namespace) -> list[Render]:
    lengths = [_SECONDS[number % len(_SECONDS)] * arguments.length for number in range(arguments.jobs)]
    fields = {"model": model, "inference_steps": arguments.steps, "guidance_scale": 3.0}
    return [
        render_message(Path(), audio_duration=max(seconds, 1), seeds=(seed,), **fields)
        for seed, seconds in enumerate(lengths)
    ]


def _round(ways: tuple[Way, Way], *, turned: bool) -> tuple[float, float]:
    """Return the seconds that each way took."""
    taken = [0.0, 0.0]
    for which in (1, 0) if turned else (0, 1):
        began = time.perf_counter()
        ways[which]()
        taken[which] = time.perf_counter() - began
    return taken[0], taken[1]


def _together(harness: SchedulerHarness, messages: Sequence[Render]) -> None:
    with harness.held():
        all_futures = [harness.submit(message) for message in messages]
    for futures in all_futures:
        futures.audio[-1].result()


def _one_by_one(harness: SchedulerHarness, messages: Sequence[Render]) -> None:
    for message in messages:
        harness.submit(message).audio[-1].result()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash infra/dev bench packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=8, help="songs (8)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (9)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of each song (8)")
    parser.add_argument("--length", type=float, default=1.0, help="factor on the songs' lengths, 8 to 60 seconds (1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
