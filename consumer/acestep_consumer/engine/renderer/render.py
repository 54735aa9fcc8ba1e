# SPDX-License-Identifier: Apache-2.0
"""A job's way through the renderer: inputs in, songs out as files. One call is one job, in a thread of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import structlog
import torch

from acestep_consumer.audio import codec
from acestep_consumer.domain.errors import Cancelled, RenderFailed
from acestep_consumer.domain.job import Rendering, TokenizedSource, Track
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.messages import Render, TokenizeAudio
from acestep_consumer.engine.renderer.batch_request import BatchFutures, RequestCallbacks
from acestep_consumer.engine.renderer.errors import translate
from acestep_consumer.engine.renderer.model_runner import lora_of
from acestep_consumer.engine.renderer.pipeline_arguments import (
    DecodedInputs,
    PipelineArguments,
    arguments_for,
    reads_source,
)
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.policy.tiers import MAX_DURATION_S

Stopped = Callable[[], bool]
# Denoising takes this share of the stage, the VAE decode the rest.
_DENOISING = 0.9

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RenderResources:
    """What every job of this process uses: the device's batcher, the limit of inputs, and a slot for each CPU core."""

    batcher: Scheduler
    max_input_s: float = MAX_DURATION_S
    cores: AbstractContextManager[object] = field(default_factory=nullcontext)

    def decode(self, path: Path, sample_rate: int, what: str, cancelled: Stopped) -> codec.Samples:
        """Read one input, as ``audio.decode`` does; no more inputs at a time than there are CPU cores."""
        with self.cores:
            return codec.decode(
                path, sample_rate=sample_rate, max_seconds=self.max_input_s, what=what, stopped=cancelled
            )


def render(equipment: RenderResources, order: Render, report: Report, cancelled: Stopped) -> Rendering:
    """Make the songs of one job and encode them into its folder as ``0.mp3``, ``1.mp3``, ….

    ``report`` hears of the stages ``render`` and ``encode``. ``cancelled`` is asked between denoising steps and between
    files. Inputs longer than the limit are refused.

    Raises:
        Cancelled: ``cancelled`` said so.
        Failed: the job cannot be done; also ``LimitExceeded``, when an input is longer than the tier allows.
    """
    try:
        return _Session(equipment, order, report, cancelled).run()
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("render failed", task_id=order.job.task_id, exc_info=error)
        raise ours from error


def listen(equipment: RenderResources, order: TokenizeAudio, cancelled: Stopped) -> TokenizedSource:
    """Read a job's source audio as audio codes. Raises ``Failed`` errors; ``Cancelled`` when ``cancelled`` says so."""
    try:
        return _listen(equipment, order, cancelled)
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("listening failed", task_id=order.job.task_id, exc_info=error)
        raise ours from error


def _listen(equipment: RenderResources, order: TokenizeAudio, cancelled: Stopped) -> TokenizedSource:
    if order.sources.source is None:
        raise RenderFailed("full_analysis_only needs source audio: src_audio_path")
    name = order.job.model.used
    rate = equipment.batcher.models[name].sample_rate
    samples = equipment.decode(order.sources.source, rate, "the source audio", cancelled)
    codes = equipment.batcher.listen(name, torch.from_numpy(samples), order.job.seeds[0])
    return TokenizedSource(codes="".join(f"<|audio_code_{code}|>" for code in codes), source_s=samples.shape[-1] / rate)


class _Session:
    def __init__(self, equipment: RenderResources, order: Render, report: Report, cancelled: Stopped) -> None:
        self._equipment = equipment
        self._order = order
        self._job = order.job
        self._report = report
        self._cancelled = cancelled
        self._model = equipment.batcher.models[order.job.model.used]

    def run(self) -> Rendering:
        started = perf_counter()
        self._stop_if_cancelled()
        inputs = self._listen()
        arguments = arguments_for(self._job, self._order.plan, self._model, inputs)
        performance = self._sing(arguments)
        tracks, encode_s = self._encode(performance)
        return Rendering(
            tracks=tracks,
            render_s=perf_counter() - started - encode_s,
            encode_s=encode_s,
            adjustments=arguments.adjustments,
            warnings=(*arguments.warnings, *performance.notes),
        )

    def _listen(self) -> DecodedInputs:
        """Decode the inputs that the task uses."""

        def read(path: Path | None, what: str) -> torch.Tensor | None:
            if path is None:
                return None
            samples = self._equipment.decode(path, self._model.sample_rate, what, self._cancelled)
            return torch.from_numpy(samples)

        sources = self._order.sources
        source = sources.source if reads_source(self._job, self._order.plan) else None
        return DecodedInputs(read(source, "the source audio"), read(sources.reference, "the reference audio"))

    def _sing(self, arguments: PipelineArguments) -> BatchFutures:
        asked = self._job.request.lora
        lora = lora_of(self._order.sources.lora, asked.scale) if asked else None
        watch = RequestCallbacks(self._cancelled, lambda done: self._report(_DENOISING * done, "render"))
        return self._equipment.batcher.sing(self._model.name, arguments, lora, watch)

    def _encode(self, performance: BatchFutures) -> tuple[tuple[Track, ...], float]:
        """Encode each song as soon as it is there. Returns the tracks and the seconds that the last one took."""
        tracks, took_s = [], 0.0
        for index, (sound, seed) in enumerate(zip(performance.sounds, self._job.seeds, strict=True)):
            song = sound.result().wait()
            if index == len(self._job.seeds) - 1:
                self._report(1.0, "render")
            self._stop_if_cancelled()
            with self._equipment.cores:
                begun = perf_counter()
                tracks.append(self._track(song, seed, self._order.folder / str(index)))
                took_s = perf_counter() - begun
            self._report((index + 1) / len(self._job.seeds), "encode")
        return tuple(tracks), took_s

    def _track(self, song: torch.Tensor, seed: int, stem: Path) -> Track:
        audio_format = self._job.request.audio_format
        file = codec.encode(song.numpy(), stem, audio_format, self._model.sample_rate)
        return Track(
            path=file.path,
            seed=seed,
            format=audio_format,
            content_type=file.content_type,
            sample_rate=file.sample_rate,
            channels=file.channels,
            duration_s=file.duration_s,
        )

    def _stop_if_cancelled(self) -> None:
        if self._cancelled():
            raise Cancelled
