# SPDX-License-Identifier: Apache-2.0
"""A job's way through the renderer: inputs in, pipeline, songs out as files. One call is one job, in one lane."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import structlog
import torch

from consumer import audio
from consumer.engine.messages import Listen, Render
from consumer.engine.renderer.arguments import Arguments, Inputs, arguments_for, reads_source
from consumer.engine.renderer.faults import translate
from consumer.engine.renderer.lane import Lane
from consumer.errors import Cancelled, RenderFailed
from consumer.job import Heard, Rendering, Track
from consumer.policy.tiers import MAX_DURATION_S
from consumer.ports import Report

Stopped = Callable[[], bool]
# Denoising takes this share of the stage, the VAE decode the rest.
_DENOISING = 0.9

log = structlog.get_logger()


def render(
    lane: Lane, order: Render, report: Report, cancelled: Stopped, *, max_input_s: float = MAX_DURATION_S
) -> Rendering:
    """Make the songs of one job and encode them into its folder as ``0.mp3``, ``1.mp3``, ….

    ``report`` hears of the stages ``render`` and ``encode``. ``cancelled`` is asked between denoising steps and between
    files. Inputs longer than ``max_input_s`` seconds are refused.

    Raises:
        Cancelled: ``cancelled`` said so.
        Failed: the job cannot be done; also ``LimitExceeded``, when an input is longer than the tier allows.
    """
    try:
        return _Session(lane, order, report, cancelled).run(max_input_s)
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("render failed", task_id=order.job.task_id, exc_info=error)
        raise ours from error


def listen(lane: Lane, order: Listen, *, max_input_s: float = MAX_DURATION_S) -> Heard:
    """Read a job's source audio as audio codes. Raises ``Failed`` errors."""
    try:
        return _listen(lane, order, max_input_s)
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("listening failed", task_id=order.job.task_id, exc_info=error)
        raise ours from error


def _listen(lane: Lane, order: Listen, max_input_s: float) -> Heard:
    if order.sources.source is None:
        raise RenderFailed("full_analysis_only needs source audio: src_audio_path")
    name = order.job.model.used
    rate = lane.models[name].sample_rate
    samples = audio.decode(order.sources.source, sample_rate=rate, max_seconds=max_input_s, what="the source audio")
    codes = lane.listen(name, torch.from_numpy(samples), order.job.seeds[0])
    return Heard(codes="".join(f"<|audio_code_{code}|>" for code in codes), source_s=samples.shape[-1] / rate)


class _Session:
    def __init__(self, lane: Lane, order: Render, report: Report, cancelled: Stopped) -> None:
        self._lane = lane
        self._order = order
        self._job = order.job
        self._report = report
        self._cancelled = cancelled
        self._model = lane.models[order.job.model.used]

    def run(self, max_input_s: float) -> Rendering:
        started = perf_counter()
        self._stop_if_cancelled()
        inputs = self._listen(max_input_s)
        arguments = arguments_for(self._job, self._order.plan, self._model, inputs)
        songs = self._sing(arguments)
        sung = perf_counter()
        tracks = self._encode(songs)
        return Rendering(
            tracks=tracks,
            render_s=sung - started,
            encode_s=perf_counter() - sung,
            adjustments=arguments.adjustments,
            warnings=(*arguments.warnings, *self._lane.cut_texts(self._model.name, arguments)),
        )

    def _listen(self, max_input_s: float) -> Inputs:
        """Decode the inputs that the task uses."""

        def read(path: Path | None, what: str) -> torch.Tensor | None:
            if path is None:
                return None
            rate = self._model.sample_rate
            return torch.from_numpy(audio.decode(path, sample_rate=rate, max_seconds=max_input_s, what=what))

        sources = self._order.sources
        source = sources.source if reads_source(self._job, self._order.plan) else None
        return Inputs(read(source, "the source audio"), read(sources.reference, "the reference audio"))

    def _sing(self, arguments: Arguments) -> torch.Tensor:
        def on_step(done: int) -> None:
            self._stop_if_cancelled()
            self._report(_DENOISING * done / arguments.steps, "render")

        songs = self._lane.sing(self._model.name, arguments, on_step)
        self._report(1.0, "render")
        return songs

    def _encode(self, songs: torch.Tensor) -> tuple[Track, ...]:
        tracks = []
        for index, (song, seed) in enumerate(zip(songs, self._job.seeds, strict=True)):
            self._stop_if_cancelled()
            tracks.append(self._track(song, seed, self._order.folder / str(index)))
            self._report((index + 1) / len(songs), "encode")
        return tuple(tracks)

    def _track(self, song: torch.Tensor, seed: int, stem: Path) -> Track:
        audio_format = self._job.request.audio_format
        file = audio.encode(song.numpy(), stem, audio_format, self._model.sample_rate)
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
