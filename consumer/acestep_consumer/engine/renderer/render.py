# SPDX-License-Identifier: Apache-2.0
"""Rendering of one job: decode its inputs, have its songs made on the device, and encoded (``encode_songs``).

One call is one job, in a thread of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter

import structlog
import torch

from acestep_consumer.audio import codec
from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.errors import Cancelled, InputUnreadable, InvalidRequest
from acestep_consumer.domain.job import (
    Job,
    LoadedModel,
    Rendering,
    TokenizedSource,
)
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.messages import Render, TokenizeAudio
from acestep_consumer.engine.renderer.batch_request import BatchFutures, RequestCallbacks
from acestep_consumer.engine.renderer.encode_songs import SongEncoder, pending_songs
from acestep_consumer.engine.renderer.errors import translate
from acestep_consumer.engine.renderer.latents import (
    LatentsUnusable,
    PlacedLatents,
    SourceLatents,
    read_latents,
)
from acestep_consumer.engine.renderer.loudness_report import loudness_adjustments
from acestep_consumer.engine.renderer.model_runner import loras_of
from acestep_consumer.engine.renderer.pipeline_arguments import (
    DecodedInputs,
    PipelineArguments,
    arguments_for,
    reads_source,
)
from acestep_consumer.engine.renderer.render_resources import RenderResources, Stopped
from acestep_schemas.request import FieldProblem

NEEDS_SOURCE = FieldProblem(field="src_audio_path", value="", rule="an analysis needs source audio")
# Denoising takes this part of the stage, the VAE decode the rest.
_DENOISING = 0.9

log = structlog.get_logger()


def render(resources: RenderResources, message: Render, report: Report, stopped: Stopped) -> Rendering:
    """Render the songs of one job and encode them into its folder as ``0.mp3``, ``1.mp3``, …, or the best of them.

    ``report`` is called for the stages ``render`` and ``encode``. ``stopped`` is asked between denoising steps and
    between files. Inputs longer than the limit are refused.

    Raises:
        Cancelled: ``stopped`` returned true.
        Failed: the job cannot be done; also ``LimitExceeded``, when an input is longer than the tier allows.
    """
    with _translated("render failed", message.job):
        return _JobRenderer(resources, message, report, stopped).run()


def tokenize_audio(resources: RenderResources, message: TokenizeAudio, stopped: Stopped) -> TokenizedSource:
    """Turn a job's source audio into audio codes. Raises ``Failed``; ``Cancelled`` when ``stopped`` returns true."""
    with _translated("audio tokenization failed", message.job):
        return _tokenize(resources, message, stopped)


@contextmanager
def _translated(event: str, job: Job) -> Iterator[None]:
    """Raise a job's errors as those of this product, and log what was raised."""
    try:
        yield
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning(event, task_id=job.task_id, exc_info=error)
        raise ours from error


def _tokenize(resources: RenderResources, message: TokenizeAudio, stopped: Stopped) -> TokenizedSource:
    if message.sources.source is None:
        raise InvalidRequest([NEEDS_SOURCE])
    name = message.job.model.used
    model = resources.scheduler.models[name]
    rate = model.sample_rate
    audio = resources.decode(message.sources.source, rate, "the source audio", stopped, message.job.rank)
    _require_length(audio, model, "the source audio")
    codes = resources.scheduler.tokenize_audio(name, torch.from_numpy(audio), message.job.seeds[0])
    return TokenizedSource(codes=format_codes(codes), source_s=audio.shape[-1] / rate)


def _require_length(audio: codec.Samples, model: LoadedModel, what: str) -> None:
    """Refuse audio of less than one latent frame, which the VAE cannot encode."""
    seconds, least = audio.shape[-1] / model.sample_rate, 1 / model.latent_rate
    if seconds < least:
        raise InputUnreadable(f"{what} is too short: it has {seconds:.4f} seconds, and at least {least:g} are needed")


class _JobRenderer:
    def __init__(self, resources: RenderResources, message: Render, report: Report, stopped: Stopped) -> None:
        self._resources = resources
        self._message = message
        self._job = message.job
        self._report = report
        self._stopped = stopped
        self._model = resources.scheduler.models[message.job.model.used]
        self._warnings: list[str] = []
        self._ended = False

    def run(self) -> Rendering:
        started = perf_counter()
        self._raise_if_stopped()
        inputs = self._decode_inputs()
        arguments = arguments_for(self._job, self._message.plan, self._model, inputs)
        try:
            futures = self._submit(self._parts(arguments))
            warnings = [each.warnings for each in futures]
            songs = deque(pending_songs(futures))
            del futures
            encoder = SongEncoder(self._resources, self._message, arguments, self._report, self._stopped)
            encode = encoder.encode if self._job.request.candidates is None else encoder.encode_best
            made = encode(songs)
        finally:
            self._ended = True
        return replace(
            made,
            render_s=perf_counter() - started - made.encode_s,
            adjustments=(*arguments.adjustments, *loudness_adjustments(self._job.request, made.tracks)),
            edits=arguments.edits,
            warnings=(
                *dict.fromkeys((*self._warnings, *encoder.warnings)),
                *arguments.warnings,
                *self._loudness_warnings(arguments),
                *dict.fromkeys(chain(*warnings)),
                *made.warnings,
            ),
        )

    def _loudness_warnings(self, arguments: PipelineArguments) -> Iterator[str]:
        if self._job.request.loudness_lufs is not None and arguments.kept_samples(self._model.sample_rate) is not None:
            yield (
                "loudness_lufs: the kept samples of the source are brought to another level with the new ones; with 0 "
                "they stay as they are"
            )

    def _decode_inputs(self) -> DecodedInputs:
        """Decode the inputs that the task uses."""

        def decode(path: Path | None, what: str) -> torch.Tensor | None:
            if path is None:
                return None
            audio = self._resources.decode(path, self._model.sample_rate, what, self._stopped, self._job.rank)
            _require_length(audio, self._model, what)
            return torch.from_numpy(audio)

        sources = self._message.sources
        source = decode(sources.source if reads_source(self._job, self._message.plan) else None, "the source audio")
        reference = decode(sources.reference, "the reference audio")
        return DecodedInputs(source, reference, None if source is None else self._latents_of(source))

    def _latents_of(self, source: torch.Tensor) -> SourceLatents | None:
        """Return the source's own latents; None where they are no use, with a warning: it is encoded then."""
        if self._job.source is None or self._job.source.latents is None:
            return None
        path, seconds = self._message.sources.source_latents, source.shape[-1] / self._model.sample_rate
        try:
            return read_latents(path, self._resources.scheduler.latent_spaces[self._model.name], seconds)
        except LatentsUnusable as error:
            self._warnings.append(f"the source's audio was encoded, and its latents were not used: {error}")
            return None

    def _parts(self, arguments: PipelineArguments) -> Sequence[PipelineArguments]:
        """Return the arguments of what is rendered: all songs together, or each stem, whose text differs, by itself.

        Stems share batches as different jobs do. Their source is encoded once.
        """
        asked = self._job.request
        if not asked.stems or arguments.src_audio is None:
            return (arguments,)
        latents = arguments.src_latents or PlacedLatents(
            self._resources.scheduler.encode_audio(
                self._model.name, arguments.src_audio, arguments.seeds[0], tiled=arguments.tiled
            )
        )
        alone = replace(
            arguments, src_latents=latents, seeds=arguments.seeds[:1], retake_seeds=arguments.retake_seeds[:1]
        )
        return [replace(alone, track_name=name) for name in asked.track_classes]

    def _submit(self, parts: Sequence[PipelineArguments]) -> list[BatchFutures]:
        loras = loras_of(self._job.request, self._message.sources.loras)
        done = [0.0] * len(parts)

        def progress_of(part: int) -> Callable[[float], None]:
            def progressed(fraction: float) -> None:
                done[part] = fraction
                self._report(_DENOISING * sum(done) / len(done), "render")

            return progressed

        return [
            self._resources.scheduler.submit(
                self._model.name,
                each,
                loras,
                RequestCallbacks(self._is_over, progress_of(part)),
                rank=self._job.rank,
                keep_latents=self._resources.keep_latents,
            )
            for part, each in enumerate(parts)
        ]

    def _is_over(self) -> bool:
        """Whether nobody waits for more songs: the job was stopped, or one of its songs has failed."""
        return self._ended or self._stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopped():
            raise Cancelled
