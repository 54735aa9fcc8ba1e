# SPDX-License-Identifier: Apache-2.0
"""What songs from songs cost on a GPU, beside a plain song, side by side in one run.

    python -m tests.bench.bench_source_songs_gpu [--seconds 300] [--rounds 5] [--base]

Full-size random weights. Each line is the median of the rounds, in turn: a plain song with and without its latents
kept; a repaint of ten seconds of it whose source is encoded, and one that starts from the latents; with ``--base`` also
twelve stems in one job, and twelve extracts one after the other. ``--tiny`` tries the script out on a CPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.tasks import TRACK_CLASSES
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.batch_request import AudioCopy, RequestCallbacks
from acestep_consumer.engine.renderer.latents import PlacedLatents, write_latents
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.window import keep_rules
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.bench import full_size


class Maker:
    """Makes songs of one model, and waits for them."""

    def __init__(self, scheduler: Scheduler, model: str, folder: Path) -> None:
        self._scheduler = scheduler
        self._model = model
        self._folder = folder

    def make(self, *songs: PipelineArguments, keep: bool = False) -> list[AudioCopy]:
        """Make songs at once."""
        submit = self._scheduler.submit
        futures = [submit(self._model, each, None, RequestCallbacks(), keep_latents=keep) for each in songs]
        made = [future.audio[0].result() for future in futures]
        for each in made:
            each.wait()
        return made

    def make_and_write(self, song: PipelineArguments) -> Path:
        """Make a song, and write its latents as a worker does."""
        (made,) = self.make(song, keep=True)
        assert made.latents is not None
        space = self._scheduler.latent_spaces[self._model]
        gain = made.latents.gain.item()
        return write_latents(made.latents, self._folder / "latents", model=self._model, space=space, gain=gain).path


def cases(maker: Maker, asked: argparse.Namespace) -> Mapping[str, Callable[[], object]]:
    """Return what is measured, by its name."""
    steps, guidance = (50, 7.0) if asked.base else (8, 1.0)
    plain = PipelineArguments(
        prompt="slow jazz",
        lyrics="la la",
        num_inference_steps=2 if asked.tiny else steps,
        guidance_scale=guidance,
        audio_duration=float(asked.seconds),
        seeds=(7,),
    )
    (song,) = maker.make(plain, keep=True)
    assert song.latents is not None
    middle = asked.seconds / 2
    repaint = replace(
        plain,
        task_type="repaint",
        audio_duration=None,
        src_audio=song.audio.clamp(-1, 1),
        repainting_start=middle - 5,
        repainting_end=middle + 5,
        keep=keep_rules("balanced", 0.5, last_step=asked.base),
    )
    latents = PlacedLatents(song.latents.values.float(), song.latents.gain.item())
    found: dict[str, Callable[[], object]] = {
        "plain song": lambda: maker.make(plain),
        "plain song, latents kept and written": lambda: maker.make_and_write(plain),
        "repaint, source encoded": lambda: maker.make(repaint),
        "repaint, from latents": lambda: maker.make(replace(repaint, src_latents=latents)),
    }
    if asked.base:
        stems = [
            replace(repaint, task_type="extract", track_name=name, repainting_start=None, repainting_end=None)
            for name in TRACK_CLASSES
        ]
        found["12 stems in one job, from latents"] = lambda: maker.make(
            *(replace(stem, src_latents=latents) for stem in stems)
        )
        found["12 extracts one after the other"] = lambda: [maker.make(stem) for stem in stems]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", action="store_true", help="the base model instead of turbo")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    model = tiny_checkpoint.BASE if asked.base else tiny_checkpoint.TURBO
    with TemporaryDirectory() as folder, torch.no_grad():
        if asked.tiny:
            tiny_checkpoint.write(Path(folder))
        else:
            full_size.write(Path(folder), model)
        device = "cpu" if asked.tiny else "cuda"
        settings = EngineSettings(checkpoint_dir=Path(folder), config_path=model, device=device, pack_wait_ms=0)
        maker = Maker(startup.open_runtime(settings).scheduler, model, Path(folder))
        measured = cases(maker, asked)
        took: dict[str, list[float]] = {name: [] for name in measured}
        for number in range(asked.rounds + 1):
            for name, make in measured.items():
                began = time.perf_counter()
                make()
                if number:  # the first round warms up
                    took[name].append(time.perf_counter() - began)
        for name, times in took.items():
            spread = f"{1000 * min(times):.0f} to {1000 * max(times):.0f}"
            sys.stdout.write(f"{name}: {1000 * median(times):.0f} ms ({spread})\n")
        size = maker.make_and_write(replace(_short(), audio_duration=float(asked.seconds))).stat().st_size
        sys.stdout.write(f"latents of {asked.seconds} s: {size:,} bytes\n")


def _short() -> PipelineArguments:
    return PipelineArguments(prompt="slow jazz", lyrics="la la", num_inference_steps=1, seeds=(7,))


if __name__ == "__main__":
    main()
