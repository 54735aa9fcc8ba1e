# SPDX-License-Identifier: Apache-2.0
"""A renderer's batcher in this process, with the tiny models: jobs for it, and eyes on what it does with them."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from acestep_consumer.audio.codec import encode
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Job, Plan, Sources
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.batch_request import AudioCopy, BatchFutures, BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.model_runner import ModelRunner, lora_of
from acestep_consumer.engine.renderer.pipeline_arguments import DecodedInputs, arguments_for, reads_source
from acestep_consumer.engine.renderer.sample import Sample
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from acestep_consumer.policy.memory_budget import MemoryBudget
from acestep_schemas.events import LimitsReport, Metas, ModelChoice, PolicyReport
from acestep_schemas.request import GenerationRequest

RATE, FRAMES_PER_S = 48_000, 25
WITHIN_S = 120.0
CODES = "".join(f"<|audio_code_{61 * index}|>" for index in range(10))


def order_for(
    folder: Path,
    *,
    seeds: Sequence[int] = (7,),
    sources: Sources | None = None,
    plan: Plan | None = None,
    **fields: Any,
) -> Render:
    """Return an admitted job of one second, two steps, as float32 WAV, unless ``fields`` say otherwise."""
    usual = {"prompt": "slow jazz", "lyrics": "[verse]\nla la", "audio_format": "wav32", "inference_steps": 2}
    task = fields.get("task_type", "text2music")
    length = {"audio_duration": 1} if task == "text2music" and "audio_code_string" not in fields else {}
    asked = GenerationRequest.model_validate({**usual, **length, **fields})
    limits = LimitsReport(max_duration_s=600, max_batch_size=8)
    return Render(
        order=1,
        job=Job(
            task_id="job",
            request=asked,
            model=ModelChoice(requested=None, used=asked.model or TURBO, fallback=False),
            lm=None,
            policy=PolicyReport(tier="unlimited", vram_gb=0, lm_loaded=False, table_version="1", limits=limits),
            seeds=tuple(seeds),
        ),
        plan=plan or Plan(metas=Metas()),
        sources=sources or Sources(),
        folder=folder,
    )


def recording(stem: Path, *, seconds: float, hz: float) -> Path:
    """Write a chord over noise, in float32."""
    times = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(round(hz)).normal(0, 0.05, (2, len(times)))
    chord = np.stack((np.sin(2 * math.pi * hz * times), np.sin(3 * math.pi * hz * times))) / 3
    return encode((chord + noise).astype(np.float32), stem, "wav32", RATE).path


def open_booths(checkpoints: Path) -> dict[str, ModelRunner]:
    """Load both tiny models once; any number of batchers can use them in turn."""
    settings = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cpu", pack_wait_ms=0)
    return dict(startup.open_studio(settings).batcher._booths)


@dataclass(frozen=True, slots=True)
class Pack:
    """One step of the DiT: whose songs were in it, and how far each was."""

    model: str
    songs: tuple[Sample, ...]
    steps: tuple[int, ...]
    tokens: int


@dataclass(slots=True)
class Result:
    """What a job became."""

    latents: list[torch.Tensor]
    audio: list[torch.Tensor]
    notes: list[str]


@dataclass(slots=True)
class Stage:
    """A batcher of a test's own, and a diary of what it did."""

    booths: dict[str, ModelRunner]
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    packs: list[Pack] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    batcher: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.batcher = Scheduler(self.booths, torch.device("cpu"), self.budget)

    def submit(self, order: Render, watch: RequestCallbacks | None = None) -> BatchFutures:
        """Hand a job over, as the renderer does; returns at once."""
        model = self.batcher.models[order.job.model.used]
        source = order.sources.source if reads_source(order.job, order.plan) else None
        inputs = DecodedInputs(_read(source), _read(order.sources.reference))
        asked = order.job.request.lora
        lora = lora_of(order.sources.lora, asked.scale) if asked else None
        arguments = arguments_for(order.job, order.plan, model, inputs)
        return self.batcher.sing(model.name, arguments, lora, watch or RequestCallbacks())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the device's thread busy: what is submitted inside is found all at once afterwards."""
        busy, over = threading.Event(), threading.Event()

        def wait() -> None:
            busy.set()
            assert over.wait(WITHIN_S)

        holder = threading.Thread(target=self.batcher.errand, args=(wait,))
        holder.start()
        try:
            assert busy.wait(WITHIN_S)
            yield
        finally:
            over.set()
            holder.join(WITHIN_S)

    def together(self, orders: Sequence[Render]) -> list[Result]:
        """Submit jobs at one moment and return what became of them."""
        with self.held():
            performances = [self.submit(order) for order in orders]
        return [self.result(performance) for performance in performances]

    def alone(self, order: Render) -> Result:
        """Return what becomes of a job that has no company."""
        return self.result(self.submit(order))

    def result(self, performance: BatchFutures) -> Result:
        """Wait for a job. Raises what broke it."""
        audio = [sound.result(WITHIN_S).wait() for sound in performance.sounds]
        return Result([self.latents[id(sound)] for sound in performance.sounds], audio, performance.notes)

    @property
    def largest(self) -> int:
        """Songs in the largest pack so far."""
        return max(len(pack.songs) for pack in self.packs)


def watch_the_device(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each pack and each song's latents into the stage's diary."""
    step, deliver, batcher = ModelRunner.step, BatchRequest.deliver, stage.batcher

    def watched_step(self: ModelRunner, songs: Sequence[Sample], lora: Any) -> Any:
        tally = batcher.tally
        steps = tuple(song.step for song in songs)
        stage.packs.append(Pack(self.parts.model.name, tuple(songs), steps, tally.tokens_in_pack))
        return step(self, songs, lora)

    def watched_delivery(self: BatchRequest, song: Sample, sound: AudioCopy) -> None:
        index = next(index for index, each in enumerate(self.songs) if each is song)
        stage.latents[id(self.performance.sounds[index])] = song.latents.clone()
        deliver(self, song, sound)

    monkeypatch.setattr(ModelRunner, "step", watched_step)
    monkeypatch.setattr(BatchRequest, "deliver", watched_delivery)


def assert_same(ours: Result, theirs: Result) -> None:
    """Equal up to the rounding of float32: a pack adds up in another order."""
    assert len(ours.audio) == len(theirs.audio)
    for mine, other in zip((*ours.latents, *ours.audio), (*theirs.latents, *theirs.audio), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until ``condition`` holds. Raises ``AssertionError`` when it does not within the deadline."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} seconds"
        time.sleep(0.002)


def _read(path: Path | None) -> torch.Tensor | None:
    return None if path is None else torch.from_numpy(soundfile.read(path, dtype="float32")[0].T.copy())
