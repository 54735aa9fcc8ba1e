# SPDX-License-Identifier: Apache-2.0
"""Types of a job's stages: Request -> Job -> Plan -> Track -> StoredObject. All frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from acestep_consumer.domain.tasks import Variant
from acestep_schemas.events import (
    Adjustment,
    Candidate,
    Edit,
    LmChoice,
    Loudness,
    LyricLine,
    Metas,
    ModelChoice,
    ParentSong,
    PolicyReport,
)
from acestep_schemas.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A DiT model that the renderer holds. ``sample_rate`` in Hz, ``latent_rate`` in latent frames a second.

    ``global_caption``: it was trained with a caption of the whole song beside that of the part. ``wide``: an XL model,
    whose DiT is wider than its condition encoder.
    """

    name: str
    variant: Variant
    sample_rate: int = 48_000
    latent_rate: float = 25.0
    global_caption: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSong:
    """A song of an earlier task that takes the place of source audio.

    ``uri``: its audio in S3; ``latents``: its final latents there, None where they were not kept; ``track``: the track
    that it is of, None: it is a whole song.
    """

    task_id: str
    index: int
    uri: str
    latents: str | None = None
    track: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A readable message: its id, the validated body, and what was odd about it.

    Once the songs that it names are looked up, ``body`` has what follows from them: ``source`` is the one to work on,
    ``parents`` are all that the result comes from, ``edits`` the fields that an edit was resolved to.
    """

    task_id: str
    body: GenerationRequest
    warnings: tuple[str, ...] = ()
    source: SourceSong | None = None
    parents: tuple[ParentSong, ...] = ()
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that policy has admitted. ``request`` holds the effective values, after every clamp.

    ``traceparent`` is the trace that the work belongs to, ``message`` the fingerprint of the message that asked for it.
    ``request.audio_duration`` is seconds, or None when the source audio or the planner decides;
    ``seeds`` has one entry per song; ``given`` are the fields that the producer really set; ``tries`` are the processes
    that may die under this job before it fails; None: the worker's setting. ``rank``: its place
    wherever jobs wait in this worker, lower ones first (``concurrency.priority``). ``source``, ``parents`` and
    ``edits`` are the request's.
    """

    task_id: str
    request: GenerationRequest
    model: ModelChoice
    lm: LmChoice | None
    policy: PolicyReport
    seeds: tuple[int, ...]
    given: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    tries: int | None = None
    traceparent: str | None = None
    message: str = ""
    rank: float = 0.0
    source: SourceSong | None = None
    parents: tuple[ParentSong, ...] = ()
    edits: tuple[Edit, ...] = ()

    @property
    def analysis(self) -> bool:
        """Whether the answer is metadata or audio codes alone, without a song."""
        return self.request.analysis_only or self.request.full_analysis_only or self.request.extract_codes_only

    def track_of(self, place: int) -> str | None:
        """Return the track that the song at this place is of: the one that is extracted, or that of a repainted song.

        None: it is a whole song.
        """
        asked = self.request
        if asked.task_type == "extract":
            return asked.track_classes[place] if asked.stems else asked.track_name
        return self.source.track if self.source is not None and asked.task_type == "repaint" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Files on this machine: copies of the audio inputs, in the job's scratch folder, and the LoRAs' weights.

    A LoRA from S3 lies in the scratch folder too; one of the checkpoint folder is read where it is. They are in the
    request's order. ``source_latents`` are those of ``source``, where it is a song of an earlier task that has them.
    """

    source: Path | None = None
    source_latents: Path | None = None
    reference: Path | None = None
    loras: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSource:
    """The source audio as the language model reads it: audio codes as text, 5 a second, and its length in seconds."""

    codes: str
    source_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Material of the songs: metadata, and audio codes (5 a second) per song, or none."""

    metas: Metas
    audio_codes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


SideFileKind = Literal["lrc", "vtt", "latents"]
"""Files beside a song: a field of ``SongFiles`` each."""
LYRIC_TYPES: Final = {"lrc": "text/plain; charset=utf-8", "vtt": "text/vtt; charset=utf-8"}
SIDE_FILE_SUFFIXES: Final[dict[SideFileKind, str]] = {"lrc": ".lrc", "vtt": ".vtt", "latents": ".latents.safetensors"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file that is stored beside a song, on disk: its lyrics with times, or its latents."""

    kind: SideFileKind
    path: Path
    content_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """One encoded song on disk. ``duration_s`` is seconds, ``sample_rate`` Hz.

    ``track``: the track that it is of, None for a whole song; ``peaks``: as in ``Audio``, or empty. ``lyrics`` have
    times, where these were asked for; ``lyric_score`` is how well they are sung, None: not measured. ``loudness`` is
    what was reached, where one was asked for.
    """

    path: Path
    seed: int
    format: str
    content_type: str
    sample_rate: int
    channels: int
    duration_s: float
    track: str | None = None
    peaks: str = ""
    side_files: tuple[SideFile, ...] = ()
    lyrics: tuple[LyricLine, ...] = ()
    lyric_score: float | None = None
    loudness: Loudness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """Result of the renderer for a job: the songs, the seconds it took, and what it could not do as asked.

    ``candidates``: all songs that ``tracks`` were chosen from, in the order of the seeds; none where all are kept.
    ``score_table``: version of the table that they were scored by.
    ``edits``: fields that follow from the length of the source audio, which nobody knew before.
    """

    tracks: tuple[Track, ...]
    render_s: float
    encode_s: float
    adjustments: tuple[Adjustment, ...] = ()
    warnings: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    score_table: str | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The candidates that ``tracks`` are, as places among them, in the order of the tracks."""
        ranked = sorted((each.index, place) for place, each in enumerate(self.candidates) if each.index is not None)
        return tuple(place for _, place in ranked)


NO_SONGS = Rendering(tracks=(), render_s=0.0, encode_s=0.0)
"""Of a job whose answer is metadata or audio codes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSideFile:
    """A file beside a song in S3."""

    kind: SideFileKind
    content_type: str
    uri: str
    url: str | None
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One song in S3: where it is and what it weighs, with the track that it came from."""

    track: Track
    uri: str
    url: str | None
    bytes: int
    sha256: str
    side_files: tuple[StoredSideFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A try of a message.

    ``message`` is the message's fingerprint, ``number`` counts from 1, ``unexplained`` are the earlier tries after
    which nobody was left to say why they ended.
    """

    task_id: str
    message: str
    number: int = 1
    unexplained: int = 0
