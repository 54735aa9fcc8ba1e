# SPDX-License-Identifier: Apache-2.0
"""Encoding of one job's songs into files as they are decoded: all of them, or the best. On the job's own thread."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from acestep_consumer.audio import codec
from acestep_consumer.audio.formats import FORMATS, Format
from acestep_consumer.audio.levels import Levels
from acestep_consumer.domain.errors import Cancelled, InputUnreadable
from acestep_consumer.domain.job import SIDE_FILE_SUFFIXES, Rendering, SideFile, Track
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer.batch_request import AudioCopy, BatchFutures
from acestep_consumer.engine.renderer.latents import FinalLatents, write_latents
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import AlignedLyrics, LyricTokens, align
from acestep_consumer.engine.renderer.lyrics.lyric_files import write_lyrics
from acestep_consumer.engine.renderer.output import faded, spliced
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.render_resources import RenderResources, Stopped
from acestep_consumer.engine.renderer.song_tags import song_tags
from acestep_consumer.policy.scoring import BestSongs
from acestep_schemas.events import Loudness, LyricLine


@dataclass(frozen=True, slots=True)
class _PendingSong:
    """A song that is not decoded yet. ``lyrics``: what it is aligned with; None: nothing."""

    audio: Future[AudioCopy]
    lyrics: LyricTokens | None


PendingSongs = deque[_PendingSong]
"""A job's songs in order. It is emptied, so that each is freed when it is done."""


def pending_songs(futures: Sequence[BatchFutures]) -> Iterator[_PendingSong]:
    """Yield the songs of a job in order."""
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


class SongEncoder:
    """Encodes the songs of one job into its folder, as ``0.mp3`` and so on. ``warnings``: what could not be done.

    Its methods raise ``Cancelled`` when ``stopped`` returns true, and ``Failed`` for what cannot be encoded.
    """

    def __init__(
        self,
        resources: RenderResources,
        message: Render,
        arguments: PipelineArguments,
        report: Report,
        stopped: Stopped,
    ) -> None:
        self._resources = resources
        self._job = message.job
        self._folder = message.folder
        self._arguments = arguments
        self._report = report
        self._stopped = stopped
        self._model = resources.scheduler.models[message.job.model.used]
        self.warnings: list[str] = []

    def encode(self, songs: PendingSongs) -> Rendering:
        """Encode each song as soon as it is decoded; the seconds are those of the last one."""
        tracks, took_s, count = [], 0.0, len(self._job.seeds)
        for index, seed in enumerate(self._job.seeds):
            decoded = self._next_song(songs)
            aligned = self._aligned(decoded)
            with self._resources.encoder(self._stopped, self._job.rank) as encode:
                self._report(index / count, "encode")
                begun = perf_counter()
                song = _Song(seed, self._finished(decoded.audio), aligned, decoded.latents)
                tracks.append(self._track(encode, song, index))
                took_s = perf_counter() - begun
        self._report(1.0, "encode")
        return Rendering(tracks=tuple(tracks), render_s=0.0, encode_s=took_s)

    def encode_best(self, songs: PendingSongs) -> Rendering:
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
            with self._resources.measurer(self._stopped, self._job.rank) as measure:
                self._report(index / work, "encode")
                audio = self._finished(decoded.audio)
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
            with self._resources.encoder(self._stopped, self._job.rank) as encode:
                self._report((len(self._job.seeds) + place) / work, "encode")
                tracks.append(self._track(encode, song, place))
        self._report(1.0, "encode")
        return Rendering(
            tracks=tuple(tracks),
            render_s=0.0,
            encode_s=perf_counter() - last_s,
            candidates=chosen.candidates,
            score_table=self._resources.scores.version,
            warnings=tuple(_fewer_kept(len(tracks), asked.keep)),
        )

    def _next_song(self, songs: PendingSongs) -> _DecodedSong:
        """Wait for the next song to be decoded."""
        pending = songs.popleft()
        copy = pending.audio.result()
        audio = copy.wait()
        if not songs:
            self._report(1.0, "render")
        self._raise_if_stopped()
        return _DecodedSong(audio, copy.matrices, pending.lyrics, copy.latents)

    def _latents_file(self, latents: FinalLatents, place: int, levels: Levels | None) -> SideFile:
        """Write a song's final latents beside it. ``levels``: those that it was brought to, if it was."""
        arguments, rate, name = self._arguments, self._model.sample_rate, self._model.name
        # Around a window, the file's samples are those of the source, at its level.
        kept = arguments.kept_samples(rate) is not None
        gain = arguments.level(rate) if kept else latents.gain.item()
        gain *= 1.0 if levels is None else levels.gain
        path = self._folder / f"{place}{SIDE_FILE_SUFFIXES['latents']}"
        space = self._resources.scheduler.latent_spaces[name]
        return write_latents(latents, path, model=name, space=space, gain=gain)

    def _finished(self, audio: torch.Tensor) -> torch.Tensor:
        """Return the song with the kept samples of its source, and with its fades."""
        rate, output = self._model.sample_rate, self._arguments.output
        if (kept := self._arguments.kept_samples(rate)) is not None:
            audio = spliced(audio, kept, output)
        return faded(audio, output, rate)

    def _aligned(self, song: _DecodedSong) -> AlignedLyrics | None:
        """Return the lyrics' times and score; None: they were not asked for, or could not be found."""
        matrices, song.matrices = song.matrices, None
        if matrices is None or song.lyrics is None:
            return None
        with self._resources.warper(self._stopped, self._job.rank) as warp:
            found = align(matrices.wait(), song.lyrics, self._resources.scheduler.frame_s(self._model.name), warp)
        if found is None:
            self.warnings.append("the lyrics of a song could not be aligned: their attention is not numbers")
        return found

    def _track(self, encode: codec.Encode, song: _Song, place: int) -> Track:
        """Encode a song as the file of this place, ``0.mp3`` and so on."""
        loras = self._job.request.all_loras
        if loras and not song.audio.isfinite().all():
            scales = ", ".join(f"{lora.scale:g}" for lora in loras)
            raise InputUnreadable(
                f"with this LoRA the model returns samples that are not numbers: lower lora.scale, now {scales}, "
                "or use another LoRA"
            )
        lines = song.aligned.lines if song.aligned and self._job.request.timestamps else ()
        stem = self._folder / str(place)
        wanted = self._format(song.seed, lines)
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
            side_files=tuple(self._side_files(song, place, file.levels)),
            lyrics=lines,
            lyric_score=None if song.aligned is None else round(song.aligned.score, 4),
            loudness=_loudness(file.levels),
            peaks=file.peaks,
        )

    def _side_files(self, song: _Song, place: int, levels: Levels | None) -> Iterator[SideFile]:
        """Write what lies beside a song: its lyrics with times, its final latents."""
        if song.aligned is not None and self._job.request.timestamps and song.aligned.lines:
            yield from write_lyrics(song.aligned.lines, self._folder / str(place))
        if song.latents is not None:
            yield self._latents_file(song.latents, place, levels)

    def _format(self, seed: int, lines: tuple[LyricLine, ...]) -> Format:
        """Return the format of a song's file, with its tags and with the request's own values."""
        asked = self._job.request
        prompt, lyrics = asked.prompt or self._arguments.prompt, self._arguments.lyrics
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
