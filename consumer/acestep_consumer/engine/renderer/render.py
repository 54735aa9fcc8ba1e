# SPDX-License-Identifier: Apache-2.0
"""Rendering of one job: decode its inputs, have its songs made on the device, encode them into files.

One call is one job, in a thread of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from time import perf_counter

import structlog
import torch

from acestep_consumer.audio import codec
from acestep_consumer.audio.encoding.pool import EncoderPool, Measure
from acestep_consumer.audio.formats import FORMATS, Format
from acestep_consumer.audio.levels import Levels
from acestep_consumer.audio.measures import measures_of
from acestep_consumer.audio.time_warping import Warp, warped
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
    FinalLatents,
    LatentsUnusable,
    PlacedLatents,
    SourceLatents,
    read_latents,
    write_latents,
)
from acestep_consumer.engine.renderer.loudness_report import loudness_adjustments
from acestep_consumer.engine.renderer.lyric_alignment import AlignedLyrics, LyricTokens, align
from acestep_consumer.engine.renderer.lyric_files import write_lyrics
from acestep_consumer.engine.renderer.model_runner import loras_of
from acestep_consumer.engine.renderer.output import faded, spliced
from acestep_consumer.engine.renderer.pipeline_arguments import (
    DecodedInputs,
    PipelineArguments,
    arguments_for,
    reads_source,
)
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.song_tags import song_tags
from acestep_consumer.policy.scoring import BUILT_IN, BestSongs, ScoreTable
from acestep_consumer.policy.tiers import MAX_DURATION_S
from acestep_schemas.events import Loudness, LyricLine
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
        encoders: encode and measure the songs; None: this process does.
        tags: whether files say what they are.
        scores: weighs the measures of candidates.
        keep_latents: whether the songs' final latents are written beside them.
    """

    scheduler: Scheduler
    max_input_s: float = MAX_DURATION_S
    decoders: AbstractContextManager[object] = field(default_factory=nullcontext)
    encoders: EncoderPool | None = None
    tags: bool = True
    scores: ScoreTable = BUILT_IN
    keep_latents: bool = False

    def decode(self, path: Path, sample_rate: int, what: str, stopped: Stopped) -> codec.Samples:
        """Decode one input, as ``audio.codec.decode`` does, when a decoder is free."""
        with self.decoders:
            return codec.decode(path, sample_rate=sample_rate, max_seconds=self.max_input_s, what=what, stopped=stopped)

    def encoder(self, stopped: Stopped) -> AbstractContextManager[codec.Encode]:
        """Wait for an encoder; the value of the context is the function that encodes, as ``audio.codec.encode``."""
        return nullcontext(codec.encode) if self.encoders is None else self.encoders.slot(stopped)

    def measurer(self, stopped: Stopped) -> AbstractContextManager[Measure]:
        """Wait for an encoder; the value of the context is the function that measures, as ``measures_of``."""
        return nullcontext(measures_of) if self.encoders is None else self.encoders.measurer(stopped)

    def warper(self, stopped: Stopped) -> AbstractContextManager[Warp]:
        """Wait for an encoder; the value of the context is the function that aligns lyrics, as ``warped``."""
        return nullcontext(warped) if self.encoders is None else self.encoders.warper(stopped)


def render(resources: RenderResources, message: Render, report: Report, stopped: Stopped) -> Rendering:
    """Render the songs of one job and encode them into its folder as ``0.mp3``, ``1.mp3``, …, or the best of them.

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


@dataclass(frozen=True, slots=True)
class _PendingSong:
    """A song that is not decoded yet. ``lyrics``: what it is aligned with; None: nothing."""

    audio: Future[AudioCopy]
    lyrics: LyricTokens | None


_PendingSongs = deque[_PendingSong]
"""A job's songs in order. It is emptied, so that each is freed when it is done."""


def _pending(futures: Sequence[BatchFutures]) -> Iterator[_PendingSong]:
    for each in futures:
        for song in each.audio:
            yield _PendingSong(song, each.lyrics)


@dataclass(slots=True, eq=False)
class _DecodedSong:
    """A song in RAM: its samples, and its alignment and its final latents, where they are wanted.

    ``matrices`` are large, and gone once the song is aligned.
    """

    audio: torch.Tensor
    matrices: AudioCopy | None
    lyrics: LyricTokens | None
    latents: FinalLatents | None


@dataclass(frozen=True, slots=True, eq=False)
class _Song:
    """One song of a job, as it is encoded. ``aligned``: its lyrics with times; None: they were not asked for."""

    seed: int
    audio: torch.Tensor
    aligned: AlignedLyrics | None
    latents: FinalLatents | None


def _loudness(levels: Levels | None) -> Loudness | None:
    return None if levels is None else Loudness(lufs=levels.lufs, true_peak_db=levels.true_peak_db)


def _fewer_kept(kept: int, asked: int) -> Iterator[str]:
    if kept < asked:
        yield f"keep = {asked}: {kept} kept, the other candidates could not be decoded"


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
            songs = deque(_pending(futures))
            del futures
            encode = self._encode if self._job.request.candidates is None else self._encode_best
            made = encode(songs, arguments)
        finally:
            self._ended = True
        return replace(
            made,
            render_s=perf_counter() - started - made.encode_s,
            adjustments=(*arguments.adjustments, *loudness_adjustments(self._job.request, made.tracks)),
            edits=arguments.edits,
            warnings=(
                *dict.fromkeys(self._warnings),
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

    def _encode(self, songs: _PendingSongs, arguments: PipelineArguments) -> Rendering:
        """Encode each song as soon as it is decoded; the seconds are those of the last one."""
        tracks, took_s, count = [], 0.0, len(self._job.seeds)
        for index, seed in enumerate(self._job.seeds):
            decoded = self._next_song(songs)
            aligned = self._aligned(decoded)
            with self._resources.encoder(self._stopped) as encode:
                self._report(index / count, "encode")
                begun = perf_counter()
                song = _Song(seed, self._finished(decoded.audio, arguments), aligned, decoded.latents)
                tracks.append(self._track(encode, song, index, arguments))
                took_s = perf_counter() - begun
        self._report(1.0, "encode")
        return Rendering(tracks=tuple(tracks), render_s=0.0, encode_s=took_s)

    def _encode_best(self, songs: _PendingSongs, arguments: PipelineArguments) -> Rendering:
        """Measure each song as soon as it is decoded, then encode the best.

        Beside the songs that wait to be measured, no more than ``keep`` are in RAM. The seconds are those after the
        last one was decoded.
        """
        asked, last_s = self._job.request, 0.0
        work = len(self._job.seeds) + asked.keep
        chosen: BestSongs[_Song] = BestSongs(asked.keep, self._resources.scores)
        for index, seed in enumerate(self._job.seeds):
            decoded = self._next_song(songs)
            last_s = perf_counter()
            with self._resources.measurer(self._stopped) as measure:
                self._report(index / work, "encode")
                audio = self._finished(decoded.audio, arguments)
                measures = measure(audio.numpy(), self._model.sample_rate)
            # Attention that is not a number cannot be warped.
            aligned = None if measures is None else self._aligned(decoded)
            lyrics = {} if aligned is None else {"lyrics": aligned.score}
            song = _Song(seed, audio, aligned, decoded.latents)
            chosen.add(seed, song, None if measures is None else measures | lyrics)
            del audio, decoded, song
        tracks = []
        for place, song in enumerate(chosen.best):
            self._raise_if_stopped()
            with self._resources.encoder(self._stopped) as encode:
                self._report((len(self._job.seeds) + place) / work, "encode")
                tracks.append(self._track(encode, song, place, arguments))
        self._report(1.0, "encode")
        return Rendering(
            tracks=tuple(tracks),
            render_s=0.0,
            encode_s=perf_counter() - last_s,
            candidates=chosen.candidates,
            score_table=self._resources.scores.version,
            warnings=tuple(_fewer_kept(len(tracks), asked.keep)),
        )

    def _next_song(self, songs: _PendingSongs) -> _DecodedSong:
        """Wait for the next song to be decoded."""
        pending = songs.popleft()
        copy = pending.audio.result()
        audio = copy.wait()
        if not songs:
            self._report(1.0, "render")
        self._raise_if_stopped()
        return _DecodedSong(audio, copy.matrices, pending.lyrics, copy.latents)

    def _latents_file(
        self, latents: FinalLatents, place: int, arguments: PipelineArguments, levels: Levels | None
    ) -> SideFile:
        """Write a song's final latents beside it. ``levels``: those that it was brought to, if it was."""
        rate, name = self._model.sample_rate, self._model.name
        # Around a window, the file's samples are those of the source, at its level.
        kept = arguments.kept_samples(rate) is not None
        gain = arguments.level(rate) if kept else latents.gain.item()
        gain *= 1.0 if levels is None else levels.gain
        path = self._message.folder / f"{place}{SIDE_FILE_SUFFIXES['latents']}"
        space = self._resources.scheduler.latent_spaces[name]
        return write_latents(latents, path, model=name, space=space, gain=gain)

    def _finished(self, audio: torch.Tensor, arguments: PipelineArguments) -> torch.Tensor:
        """Return the song with the kept samples of its source, and with its fades."""
        rate, output = self._model.sample_rate, arguments.output
        if (kept := arguments.kept_samples(rate)) is not None:
            audio = spliced(audio, kept, output)
        return faded(audio, output, rate)

    def _aligned(self, song: _DecodedSong) -> AlignedLyrics | None:
        """Return the lyrics' times and score; None: they were not asked for, or could not be found."""
        matrices, song.matrices = song.matrices, None
        if matrices is None or song.lyrics is None:
            return None
        with self._resources.warper(self._stopped) as warp:
            found = align(matrices.wait(), song.lyrics, self._resources.scheduler.frame_s(self._model.name), warp)
        if found is None:
            self._warnings.append("the lyrics of a song could not be aligned: their attention is not numbers")
        return found

    def _track(self, encode: codec.Encode, song: _Song, place: int, arguments: PipelineArguments) -> Track:
        """Encode a song as the file of this place, ``0.mp3`` and so on."""
        loras = self._job.request.all_loras
        if loras and not song.audio.isfinite().all():
            scales = ", ".join(f"{lora.scale:g}" for lora in loras)
            raise InputUnreadable(
                f"with this LoRA the model returns samples that are not numbers: lower lora.scale, now {scales}, "
                "or use another LoRA"
            )
        lines = song.aligned.lines if song.aligned and self._job.request.timestamps else ()
        stem = self._message.folder / str(place)
        wanted = self._format(arguments, song.seed, lines)
        file = encode(song.audio.numpy(), stem, wanted, self._model.sample_rate)
        return Track(
            path=file.path,
            seed=song.seed,
            format=self._job.request.audio_format,
            content_type=file.content_type,
            sample_rate=file.sample_rate,
            channels=file.channels,
            duration_s=file.duration_s,
            track=self._job.track_of(place),
            side_files=tuple(self._side_files(song, place, arguments, file.levels)),
            lyrics=lines,
            lyric_score=None if song.aligned is None else round(song.aligned.score, 4),
            loudness=_loudness(file.levels),
            peaks=file.peaks,
        )

    def _side_files(
        self, song: _Song, place: int, arguments: PipelineArguments, levels: Levels | None
    ) -> Iterator[SideFile]:
        """Write what lies beside a song: its lyrics with times, its final latents."""
        if song.aligned is not None and self._job.request.timestamps and song.aligned.lines:
            yield from write_lyrics(song.aligned.lines, self._message.folder / str(place))
        if song.latents is not None:
            yield self._latents_file(song.latents, place, arguments, levels)

    def _format(self, arguments: PipelineArguments, seed: int, lines: tuple[LyricLine, ...]) -> Format:
        """Return the format of a song's file, with its tags and with the request's own values."""
        asked = self._job.request
        prompt, lyrics = asked.prompt or arguments.prompt, arguments.lyrics
        found = replace(
            FORMATS[asked.audio_format],
            tags=tuple(song_tags(self._job, prompt, lyrics, seed, lines)) if self._resources.tags else (),
            loudness_lufs=asked.loudness_lufs,
            true_peak_db=asked.true_peak_db,
        )
        if asked.audio_format != "mp3":
            return found
        bits = int(asked.mp3_bitrate.removesuffix("k")) * 1_000
        return replace(found, bit_rate=bits, sample_rate=asked.mp3_sample_rate)

    def _raise_if_stopped(self) -> None:
        if self._stopped():
            raise Cancelled
