# SPDX-License-Identifier: Apache-2.0
"""Rendering of one job: decode its inputs, have its songs made on the device, encode them into files.

One call is one job, in a thread of its own.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from time import perf_counter

import structlog
import torch

from acestep_consumer.audio import codec
from acestep_consumer.audio.encoding.pool import EncoderPool
from acestep_consumer.audio.formats import FORMATS, Format
from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.errors import Cancelled, InputUnreadable, InvalidRequest
from acestep_consumer.domain.job import (
    SIDE_FILE_SUFFIXES,
    LoadedModel,
    Rendering,
    SideFile,
    TokenizedSource,
    Track,
)
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.messages import Render, TokenizeAudio
from acestep_consumer.engine.renderer.batch_request import AudioCopy, BatchFutures, RequestCallbacks
from acestep_consumer.engine.renderer.errors import translate
from acestep_consumer.engine.renderer.latents import (
    LatentsUnusable,
    PlacedLatents,
    SourceLatents,
    read_latents,
    write_latents,
)
from acestep_consumer.engine.renderer.model_runner import loras_of
from acestep_consumer.engine.renderer.output import faded, spliced
from acestep_consumer.engine.renderer.pipeline_arguments import (
    DecodedInputs,
    PipelineArguments,
    arguments_for,
    reads_source,
)
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.policy.tiers import MAX_DURATION_S
from acestep_schemas.request import FieldProblem

Stopped = Callable[[], bool]
NEEDS_SOURCE = FieldProblem(field="src_audio_path", value="", rule="an analysis needs source audio")
# Denoising takes this part of the stage, the VAE decode the rest.
_DENOISING = 0.9

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RenderResources:
    """Shared by all jobs.

    Attributes:
        scheduler: makes the songs.
        max_input_s: longest accepted input, seconds.
        decoders: held while an input is decoded; limits how many are at a time.
        encoders: encode the songs; None: this process does.
        keep_latents: whether the songs' final latents are written beside them.
    """

    scheduler: Scheduler
    max_input_s: float = MAX_DURATION_S
    decoders: AbstractContextManager[object] = field(default_factory=nullcontext)
    encoders: EncoderPool | None = None
    keep_latents: bool = False

    def decode(self, path: Path, sample_rate: int, what: str, stopped: Stopped) -> codec.Samples:
        """Decode one input, as ``audio.codec.decode`` does, when a decoder is free."""
        with self.decoders:
            return codec.decode(path, sample_rate=sample_rate, max_seconds=self.max_input_s, what=what, stopped=stopped)

    def encoder(self, stopped: Stopped) -> AbstractContextManager[codec.Encode]:
        """Wait for an encoder; the value of the context is the function that encodes, as ``audio.codec.encode``."""
        return nullcontext(codec.encode) if self.encoders is None else self.encoders.slot(stopped)


def render(resources: RenderResources, message: Render, report: Report, stopped: Stopped) -> Rendering:
    """Render the songs of one job and encode them into its folder as ``0.mp3``, ``1.mp3``, ….

    ``report`` is called for the stages ``render`` and ``encode``. ``stopped`` is asked between denoising steps and
    between files. Inputs longer than the limit are refused.

    Raises:
        Cancelled: ``stopped`` returned true.
        Failed: the job cannot be done; also ``LimitExceeded``, when an input is longer than the tier allows.
    """
    try:
        return _JobRenderer(resources, message, report, stopped).run()
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("render failed", task_id=message.job.task_id, exc_info=error)
        raise ours from error


def tokenize_audio(resources: RenderResources, message: TokenizeAudio, stopped: Stopped) -> TokenizedSource:
    """Turn a job's source audio into audio codes. Raises ``Failed``; ``Cancelled`` when ``stopped`` returns true."""
    try:
        return _tokenize(resources, message, stopped)
    except Exception as error:
        ours = translate(error)
        if ours is error:
            raise
        log.warning("audio tokenization failed", task_id=message.job.task_id, exc_info=error)
        raise ours from error


def _tokenize(resources: RenderResources, message: TokenizeAudio, stopped: Stopped) -> TokenizedSource:
    if message.sources.source is None:
        raise InvalidRequest([NEEDS_SOURCE])
    name = message.job.model.used
    model = resources.scheduler.models[name]
    rate = model.sample_rate
    audio = resources.decode(message.sources.source, rate, "the source audio", stopped)
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
            tracks, encode_s = self._encode([song for each in futures for song in each.audio], arguments)
        finally:
            self._ended = True
        return Rendering(
            tracks=tracks,
            render_s=perf_counter() - started - encode_s,
            encode_s=encode_s,
            adjustments=arguments.adjustments,
            edits=arguments.edits,
            warnings=(
                *self._warnings,
                *arguments.warnings,
                *dict.fromkeys(chain(*(each.warnings for each in futures))),
            ),
        )

    def _decode_inputs(self) -> DecodedInputs:
        """Decode the inputs that the task uses."""

        def decode(path: Path | None, what: str) -> torch.Tensor | None:
            if path is None:
                return None
            audio = self._resources.decode(path, self._model.sample_rate, what, self._stopped)
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

    def _encode(
        self, songs: Sequence[Future[AudioCopy]], arguments: PipelineArguments
    ) -> tuple[tuple[Track, ...], float]:
        """Encode each song as soon as it is decoded. Returns the tracks and the seconds that the last one took."""
        tracks, took_s = [], 0.0
        for index, (future, seed) in enumerate(zip(songs, self._job.seeds, strict=True)):
            copy = future.result()
            audio = copy.wait()
            if index == len(self._job.seeds) - 1:
                self._report(1.0, "render")
            self._raise_if_stopped()
            with self._resources.encoder(self._stopped) as encode:
                self._report(index / len(self._job.seeds), "encode")
                begun = perf_counter()
                audio = self._finished(audio, arguments)
                track = self._track(encode, audio, seed, self._message.folder / str(index))
                took_s = perf_counter() - begun
            stem = self._job.request.track_classes[index] if self._job.request.stems else None
            tracks.append(replace(track, track=stem, side_files=self._side_files(copy, index, arguments)))
        self._report(1.0, "encode")
        return tuple(tracks), took_s

    def _side_files(self, copy: AudioCopy, index: int, arguments: PipelineArguments) -> tuple[SideFile, ...]:
        """Write what lies beside a song, whose copy has arrived."""
        if copy.latents is None:
            return ()
        rate, name = self._model.sample_rate, self._model.name
        # Around a window, the file's samples are those of the source, at its level.
        kept = arguments.kept_samples(rate) is not None
        gain = arguments.level(rate) if kept else copy.latents.gain.item()
        path = self._message.folder / f"{index}{SIDE_FILE_SUFFIXES['latents']}"
        space = self._resources.scheduler.latent_spaces[name]
        return (write_latents(copy.latents, path, model=name, space=space, gain=gain),)

    def _finished(self, audio: torch.Tensor, arguments: PipelineArguments) -> torch.Tensor:
        """Return the song with the kept samples of its source, and with its fades."""
        rate, output = self._model.sample_rate, arguments.output
        if (kept := arguments.kept_samples(rate)) is not None:
            audio = spliced(audio, kept, output.peak)
        return faded(audio, output, rate)

    def _track(self, encode: codec.Encode, audio: torch.Tensor, seed: int, stem: Path) -> Track:
        loras = self._job.request.all_loras
        if loras and not audio.isfinite().all():
            scales = ", ".join(f"{lora.scale:g}" for lora in loras)
            raise InputUnreadable(
                f"with this LoRA the model returns samples that are not numbers: lower lora.scale, now {scales}, "
                "or use another LoRA"
            )
        file = encode(audio.numpy(), stem, self._format(), self._model.sample_rate)
        return Track(
            path=file.path,
            seed=seed,
            format=self._job.request.audio_format,
            content_type=file.content_type,
            sample_rate=file.sample_rate,
            channels=file.channels,
            duration_s=file.duration_s,
        )

    def _format(self) -> Format:
        """Return the format of the files, with the request's own values of an MP3."""
        asked = self._job.request
        found = FORMATS[asked.audio_format]
        if asked.audio_format != "mp3":
            return found
        bits = int(asked.mp3_bitrate.removesuffix("k")) * 1_000
        return replace(found, bit_rate=bits, sample_rate=asked.mp3_sample_rate)

    def _raise_if_stopped(self) -> None:
        if self._stopped():
            raise Cancelled
