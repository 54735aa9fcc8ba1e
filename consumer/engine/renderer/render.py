# SPDX-License-Identifier: Apache-2.0
"""A job's way through the renderer: inputs in, pipeline, songs out as files. One call is one job, in one lane."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog
import torch

from consumer import audio
from consumer.engine.renderer.arguments import Arguments, Inputs, arguments_for, reads_source
from consumer.engine.renderer.faults import translate
from consumer.engine.renderer.lane import Lane
from consumer.errors import Cancelled
from consumer.job import Job, LoadedModel, Plan, Rendering, Sources, Track
from consumer.policy.tiers import MAX_DURATION_S
from consumer.ports import Report

Stopped = Callable[[], bool]
# Denoising takes this share of the stage, the VAE decode the rest.
_DENOISING = 0.9

log = structlog.get_logger()


def render(
    lane: Lane,
    job: Job,
    plan: Plan,
    sources: Sources,
    folder: Path,
    report: Report,
    cancelled: Stopped,
    *,
    max_input_s: float = MAX_DURATION_S,
) -> Rendering:
    """Make the songs of one job and encode them into ``folder`` as ``0.mp3``, ``1.mp3``, ….

    ``report`` hears of the stages ``render`` and ``encode``. ``cancelled`` is asked between denoising steps and between
    files. Inputs longer than ``max_input_s`` seconds are refused.

    Raises:
        Cancelled: ``cancelled`` said so.
        Failed: the job cannot be done; also ``LimitExceeded``, when an input is longer than the tier allows.
    """
    try:
        return _Session(lane, job, report, cancelled).run(plan, sources, folder, max_input_s)
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("render failed", task_id=job.task_id, exc_info=error)
        raise ours from error


class _Session:
    def __init__(self, lane: Lane, job: Job, report: Report, cancelled: Stopped) -> None:
        self._lane = lane
        self._job = job
        self._report = report
        self._cancelled = cancelled
        self._model = lane.models[job.model.used]

    def run(self, plan: Plan, sources: Sources, folder: Path, max_input_s: float) -> Rendering:
        started = perf_counter()
        self._stop_if_cancelled()
        inputs = _listen(self._model, sources, max_input_s, with_source=reads_source(self._job, plan))
        arguments = arguments_for(self._job, plan, self._model, inputs)
        songs = self._sing(arguments)
        sung = perf_counter()
        tracks = self._encode(songs, folder)
        return Rendering(
            tracks=tracks,
            render_s=sung - started,
            encode_s=perf_counter() - sung,
            warnings=(*arguments.warnings, *self._lane.cut_texts(self._model.name, arguments)),
        )

    def _sing(self, arguments: Arguments) -> torch.Tensor:
        def on_step(done: int) -> None:
            self._stop_if_cancelled()
            self._report(_DENOISING * done / arguments.steps, "render")

        songs = self._lane.sing(self._model.name, arguments, on_step)
        self._report(1.0, "render")
        return songs

    def _encode(self, songs: torch.Tensor, folder: Path) -> tuple[Track, ...]:
        tracks = []
        for index, (song, seed) in enumerate(zip(songs, self._job.seeds, strict=True)):
            self._stop_if_cancelled()
            tracks.append(self._track(song, seed, folder / str(index)))
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


def _listen(model: LoadedModel, sources: Sources, max_input_s: float, *, with_source: bool) -> Inputs:
    """Decode the inputs that the task uses."""

    def read(path: Path | None, what: str) -> Any:
        if path is None:
            return None
        return torch.from_numpy(audio.decode(path, sample_rate=model.sample_rate, max_seconds=max_input_s, what=what))

    source = read(sources.source if with_source else None, "the source audio")
    return Inputs(source=source, reference=read(sources.reference, "the reference audio"))
