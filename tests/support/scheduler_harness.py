# SPDX-License-Identifier: Apache-2.0
"""The renderer's scheduler in this process, with the tiny models: jobs for it, and a record of its batches."""

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
from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.job import Job, Plan, Sources
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.batch_request import BatchFutures, BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.model_runner import ModelRunner, loras_of
from acestep_consumer.engine.renderer.pipeline_arguments import DecodedInputs, arguments_for, reads_source
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from acestep_consumer.policy.memory_budget import MemoryBudget
from acestep_schemas.events import LimitsReport, Metas, ModelChoice, PolicyReport
from acestep_schemas.request import GenerationRequest
from tests.support.waiting import WITHIN_S

RATE, FRAMES_PER_S = 48_000, 25
CODES = format_codes(61 * index for index in range(10))


def render_message(
    folder: Path,
    *,
    seeds: Sequence[int] = (7,),
    sources: Sources | None = None,
    plan: Plan | None = None,
    rank: float = 0.0,
    **fields: Any,
) -> Render:
    """Return an admitted job of one second, two steps, as float32 WAV, unless ``fields`` say otherwise."""
    usual = {"prompt": "slow jazz", "lyrics": "[verse]\nla la", "audio_format": "wav32", "inference_steps": 2}
    task = fields.get("task_type", "text2music")
    length = {"audio_duration": 1} if task == "text2music" and "audio_code_string" not in fields else {}
    asked = GenerationRequest.model_validate({**usual, **length, **fields})
    limits = LimitsReport(max_duration_s=600, max_batch_size=8)
    return Render(
        request_id=1,
        job=Job(
            task_id="job",
            request=asked,
            model=ModelChoice(requested=None, used=asked.model or TURBO, fallback=False),
            lm=None,
            policy=PolicyReport(tier="unlimited", vram_gb=0, lm_loaded=False, table_version="1", limits=limits),
            seeds=tuple(seeds),
            rank=rank,
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


def open_runners(checkpoints: Path) -> dict[str, ModelRunner]:
    """Load both tiny models once; any number of schedulers can use them in turn."""
    settings = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cpu", pack_wait_ms=0)
    return dict(startup.open_runtime(settings).scheduler._runners)


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """One step of the DiT: the samples in it, the step that each was at, and their tokens."""

    model: str
    samples: tuple[Sample, ...]
    steps: tuple[int, ...]
    tokens: int


@dataclass(slots=True)
class Result:
    """The songs of a job, and its warnings."""

    latents: list[torch.Tensor]
    audio: list[torch.Tensor]
    warnings: list[str]


@dataclass(slots=True)
class SchedulerHarness:
    """A scheduler of the test's own, and a record of its batches and of each song's final latents."""

    runners: dict[str, ModelRunner]
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    batches: list[RecordedBatch] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.runners, torch.device("cpu"), self.budget)

    def submit(self, message: Render, callbacks: RequestCallbacks | None = None) -> BatchFutures:
        """Submit a job, as the renderer does; returns at once."""
        model = self.scheduler.models[message.job.model.used]
        source = message.sources.source if reads_source(message.job, message.plan) else None
        inputs = DecodedInputs(_read(source), _read(message.sources.reference))
        loras = loras_of(message.job.request, message.sources.loras)
        arguments = arguments_for(message.job, message.plan, model, inputs)
        callbacks = callbacks or RequestCallbacks()
        return self.scheduler.submit(model.name, arguments, loras, callbacks, rank=message.job.rank)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the device's thread busy: what is submitted inside is found all at once afterwards."""
        busy, released = threading.Event(), threading.Event()

        def wait() -> None:
            busy.set()
            assert released.wait(WITHIN_S)

        holder = threading.Thread(target=self.scheduler.run_on_device, args=(wait,))
        holder.start()
        try:
            assert busy.wait(WITHIN_S)
            yield
        finally:
            released.set()
            holder.join(WITHIN_S)

    def together(self, messages: Sequence[Render]) -> list[Result]:
        """Submit jobs at one moment and return their results."""
        with self.held():
            all_futures = [self.submit(message) for message in messages]
        return [self.result(futures) for futures in all_futures]

    def alone(self, message: Render) -> Result:
        """Return the result of a job that is alone on the device."""
        return self.result(self.submit(message))

    def result(self, futures: BatchFutures) -> Result:
        """Wait for a job. Raises its error."""
        audio = [future.result(WITHIN_S).wait() for future in futures.audio]
        return Result([self.latents[id(future)] for future in futures.audio], audio, futures.warnings)

    @property
    def largest(self) -> int:
        """Samples in the largest batch so far."""
        return max(len(batch.samples) for batch in self.batches)


def record_device(harness: SchedulerHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record each batch and each song's latents in the harness."""
    step, deliver, scheduler = ModelRunner.step, BatchRequest.deliver, harness.scheduler

    def recorded_step(self: ModelRunner, samples: Sequence[Sample], lora: Any) -> Any:
        stats = scheduler.stats
        steps = tuple(sample.step for sample in samples)
        harness.batches.append(RecordedBatch(self.parts.model.name, tuple(samples), steps, stats.tokens_in_pack))
        return step(self, samples, lora)

    def recorded_delivery(self: BatchRequest, sample: Sample, audio: torch.Tensor) -> None:
        index = next(index for index, each in enumerate(self.samples) if each is sample)
        harness.latents[id(self.audio[index])] = sample.latents.clone()
        deliver(self, sample, audio)

    monkeypatch.setattr(ModelRunner, "step", recorded_step)
    monkeypatch.setattr(BatchRequest, "deliver", recorded_delivery)


def assert_same(ours: Result, theirs: Result) -> None:
    """Compare up to the rounding of float32: a batch adds up in another order."""
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
