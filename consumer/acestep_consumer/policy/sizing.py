# SPDX-License-Identifier: Apache-2.0
"""How many jobs a card should hold, and how many songs a minute to expect of it. Pure arithmetic.

The language model and the renderer share one card. Each gets as many songs as make it faster and fit into its memory;
a job more is being fetched or stored, and some are being encoded. That sum is the recommended number of workers.

The rules are those that the worker follows: the LM's memory as ``language.plan_lm`` gives it, the renderer's as its
``MemoryBudget`` counts it. The figures are in ``measured``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND
from acestep_consumer.policy import benchmarks
from acestep_consumer.policy.benchmarks import DIT_2B, REFERENCE, DitSize, GpuSpeed
from acestep_consumer.policy.lm_choice import Backend, LmPlan
from acestep_consumer.policy.memory_budget import ENOUGH_TOKENS, MemoryBudget, MemoryFootprint

Bound = Literal["memory", "renderer", "language model", "encoding"]

LEAST_WORKERS = 2
_GAIN = math.log2(1.1)
"""Twice the jobs must bring a tenth more songs; fewer only make each job wait longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """A card: its memory in GiB (0: no GPU) and its speed; a card of unknown speed counts as the measured one."""

    name: str
    vram_gb: float
    speed: GpuSpeed = REFERENCE

    @property
    def bytes(self) -> int:
        """All its memory."""
        return int(self.vram_gb * benchmarks.GIB)

    @property
    def compute(self) -> float:
        """Matrix products, relative to the measured card."""
        return self.speed.tflops / REFERENCE.tflops

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth, relative to the measured card."""
        return self.speed.gigabytes_s / REFERENCE.gigabytes_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every message asks for. ``guided``: classifier-free guidance, which doubles the DiT's work."""

    duration_s: float = 300
    batch: int = 1
    thinking: bool = True
    steps: int = 8
    guided: bool = False
    audio_format: str = "mp3"

    @property
    def frames(self) -> int:
        """Latent frames of a song."""
        return math.ceil(self.duration_s * benchmarks.FRAMES_PER_SECOND)

    @property
    def tokens(self) -> int:
        """DiT tokens that a song has in a step, all voices."""
        return math.ceil(self.duration_s * benchmarks.TOKENS_PER_SECOND) * (2 if self.guided else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LmSpec:
    """A language model on the card. ``memory``: bytes, for weights and sequences together."""

    model: str
    backend: Backend
    memory: int

    @property
    def weights(self) -> int:
        """Bytes, with what the backend takes beside them."""
        return benchmarks.lm_size(self.model).weights + benchmarks.LM_OVERHEAD_BYTES[self.backend]

    def song(self, workload: Workload) -> int:
        """Bytes of keys and values that a song takes until its last code."""
        tokens = benchmarks.LM_PROMPT_TOKENS + math.ceil(workload.duration_s * CODES_PER_SECOND)
        return benchmarks.LM_SEQUENCES_PER_SONG * tokens * benchmarks.lm_size(self.model).token_bytes

    def room(self, workload: Workload) -> int:
        """Songs that fit at once, as far as was measured."""
        return min(max(0, (self.memory - self.weights) // self.song(workload)), benchmarks.MOST_IN_LM)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSet:
    """What is on the card: DiT models (the first one works), the LM, and what waits in RAM between uses."""

    models: tuple[DitSize, ...] = (DIT_2B,)
    lm: LmSpec | None = None
    offload_models: bool = False
    offload_dit: bool = False
    pack_tokens: int = ENOUGH_TOKENS

    @property
    def weights(self) -> int:
        """Bytes of the renderer's weights on the card; with offloading one part is there at a time."""
        own = [each * 2 for each in benchmarks.OWN_PARTS]
        shared = [each * 2 for each in benchmarks.SHARED_PARTS]
        dits = [model.weights for model in self.models]
        if self.offload_models:
            others = max(*own, *shared)
            return max(*dits, others) if self.offload_dit else sum(dits) + others
        return sum(dits) + len(dits) * sum(own) + sum(shared) + benchmarks.LOADED_BEYOND_PARAMETERS

    def footprint(self) -> MemoryFootprint:
        """Bytes that the renderer's work takes, as it would measure them at start."""
        widest = max(model.hidden for model in self.models)
        return MemoryFootprint(
            weights=self.weights,
            token=benchmarks.STEP_BYTES_PER_TOKEN * widest // DIT_2B.hidden,
            condition_token=max(model.condition_bytes for model in self.models),
            tile=benchmarks.TILE_BYTES,
            frame=benchmarks.FRAME_BYTES,
        )

    def budget(self, card: GpuSpec) -> MemoryBudget:
        """Return what the renderer may use: all that the LM leaves."""
        lm = self.lm.memory if self.lm else 0
        limit = max(0, card.bytes - benchmarks.RESERVE_BYTES - lm)
        return MemoryBudget(limit=limit, footprint=self.footprint(), max_tokens=self.pack_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySplit:
    """Bytes of the card: ``card`` = ``reserve`` + ``lm`` + ``renderer``; a song takes ``lm_song`` and ``song``."""

    card: int
    reserve: int
    lm: int
    lm_song: int
    renderer: int
    weights: int
    working: int
    song: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The answer.

    Attributes:
        fits: whether weights and one song fit at all.
        workers: jobs in hand; ``ACESTEP_QUEUE_WORKERS``.
        songs_a_minute: at best, with that many; None when it does not fit or nothing was measured for it.
        bound_by: what a faster worker would need more of; None where ``songs_a_minute`` is.
        lm_jobs: of the workers, those that keep the LM busy, with ``lm_songs`` of the ``lm_room`` that fit at once.
        render_jobs: those that keep the renderer busy, with ``render_songs`` of the ``render_room`` that fit at once.
        other_jobs: those that are being fetched, encoded or stored.
        lm_s: seconds of the whole card that the LM takes for a song; ``render_s``: that the renderer takes.
        encoding_cores: processor cores that encoding keeps busy.
        split: how the memory is shared; None without a GPU.
    """

    fits: bool
    workers: int = LEAST_WORKERS
    songs_a_minute: float | None = None
    bound_by: Bound | None = None
    lm_jobs: int = 0
    lm_songs: int = 0
    lm_room: int = 0
    render_jobs: int = 1
    render_songs: int = 0
    render_room: int = 0
    other_jobs: int = 1
    lm_s: float = 0.0
    render_s: float = 0.0
    encoding_cores: float = 0.0
    split: MemorySplit | None = None


def lm_on_card(plan: LmPlan, workload: Workload) -> LmSpec:
    """Return the LM as it would be loaded: with the backend left open, vLLM unless it has no room for a song."""
    memory = int(plan.memory_gb * 1e9)
    if plan.backend is not None:
        return LmSpec(model=plan.model, backend=plan.backend, memory=memory)
    first = LmSpec(model=plan.model, backend="vllm", memory=memory)
    return first if first.room(workload) else LmSpec(model=plan.model, backend="pt", memory=memory)


def split_of(card: GpuSpec, load: ModelSet, workload: Workload) -> MemorySplit:
    """Share the card's memory out."""
    budget, lm = load.budget(card), load.lm
    return MemorySplit(
        card=card.bytes,
        reserve=min(benchmarks.RESERVE_BYTES, card.bytes),
        lm=lm.memory if lm else 0,
        lm_song=lm.song(workload) if lm else 0,
        renderer=budget.limit or 0,
        weights=load.weights,
        working=budget.working,
        song=budget.held(workload.frames, benchmarks.CONDITION_TOKENS),
    )


def render_room(split: MemorySplit) -> int:
    """Songs that the renderer can hold at once beside its weights and the largest step or decode."""
    return max(0, (split.renderer - split.weights - split.working) // split.song)


def capacity(card: GpuSpec, load: ModelSet, workload: Workload, cores: float = math.inf) -> Capacity:
    """Reckon what this card can do with this load of this workload, and with so many processor cores to encode."""
    if card.vram_gb <= 0:
        return Capacity(fits=True)
    split = split_of(card, load, workload)
    lm = load.lm if workload.thinking else None
    lm_room, room = lm.room(workload) if lm else 0, render_room(split)
    if room == 0 or (lm is not None and lm_room == 0) or (workload.thinking and lm is None):
        return Capacity(fits=False, lm_room=lm_room, render_room=room, split=split)
    return _SongTimes(card, load, lm, workload, load.budget(card).tokens, cores).capacity(split, lm_room, room)


@dataclass(frozen=True, slots=True)
class _SongTimes:
    """Times of one song on one card. ``pack``: tokens that one step takes; ``cores``: what encodes."""

    card: GpuSpec
    load: ModelSet
    lm: LmSpec | None
    workload: Workload
    pack: int
    cores: float

    def capacity(self, split: MemorySplit, lm_room: int, room: int) -> Capacity:
        batch = self.workload.batch
        rendering, wanted = self._render_jobs(room), self._render_jobs(None)
        render_s = self._render_s(min(room, rendering * batch))
        planning, asked = self._lm_jobs(lm_room, render_s), self._lm_jobs(benchmarks.MOST_IN_LM, render_s)
        lm_songs = min(lm_room, planning * batch)
        lm_s = self._lm_s(lm_songs)
        rate = min(1 / (lm_s + render_s), self._encoded_a_second)
        encoding = min(rate * self._encode_s, self.cores)
        other = max(1, math.ceil(encoding))  # a job encodes its songs one after the other
        bound: Bound = "renderer" if render_s >= lm_s else "language model"
        if rendering < wanted or planning < asked or room < batch or (self.lm is not None and lm_room < batch):
            bound = "memory"
        if self._encoded_a_second <= 1 / (lm_s + render_s):
            bound = "encoding"
        return Capacity(
            fits=True,
            workers=planning + rendering + other,
            songs_a_minute=60 * rate,
            bound_by=bound,
            lm_jobs=planning,
            lm_songs=lm_songs,
            lm_room=lm_room,
            render_jobs=rendering,
            render_songs=min(room, rendering * batch),
            render_room=room,
            other_jobs=other,
            lm_s=lm_s,
            render_s=render_s,
            encoding_cores=encoding,
            split=split,
        )

    @property
    def _encode_s(self) -> float:
        """Seconds of one core for one song."""
        return self.workload.duration_s * benchmarks.ENCODE_S_PER_SECOND[self.workload.audio_format]

    @property
    def _encoded_a_second(self) -> float:
        return self.cores / self._encode_s

    def _render_jobs(self, room: int | None) -> int:
        """Jobs that fill the renderer's packs; ``room`` None: as if memory had no end."""
        batch = self.workload.batch
        most = self.pack if room is None else max(1, room // batch)
        return _knee(most, lambda jobs: 1 / self._render_s(jobs * batch if room is None else min(room, jobs * batch)))

    def _lm_jobs(self, room: int, render_s: float) -> int:
        """Jobs that keep the LM's steps full beside the renderer, or fast enough for what encodes."""
        if self.lm is None:
            return 0
        batch = self.workload.batch

        def rate(jobs: int) -> float:
            return 1 / (self._lm_s(min(room, jobs * batch)) + render_s)

        most = _knee(max(1, room // batch), rate)
        return next((jobs for jobs in range(1, most) if rate(jobs) >= self._encoded_a_second), most)

    def _lm_s(self, songs: int) -> float:
        """Seconds of the card for one song's codes: reading weights and cache, so that bandwidth counts."""
        if self.lm is None:
            return 0.0
        rate = benchmarks.lm_songs_a_minute(self.lm.model, self.lm.backend, songs, self.workload.duration_s)
        return 60 / rate / self.card.bandwidth

    def _render_s(self, songs: int) -> float:
        """Seconds of the card for one song in packs of ``songs``, as far as a step takes them.

        A step is matrix products, and never faster than its launches, which the host makes. The VAE is bound by either
        of compute and bandwidth in turn: the slower counts.
        """
        packed = min(songs, max(1, self.pack // self.workload.tokens))
        size = self.load.models[0].parameters / DIT_2B.parameters
        token_s = benchmarks.STEP_S_PER_TOKEN * size / self.card.compute
        step = max(packed * self.workload.tokens * token_s, benchmarks.STEP_FLOOR_S)
        decode = benchmarks.DECODE_S_PER_SECOND * self.workload.duration_s
        slowest = min(self.card.compute, self.card.bandwidth)
        return self.workload.steps * step / packed + decode / slowest + benchmarks.PREPARE_S


def _knee(most: int, rate: Callable[[int], float]) -> int:
    """Return the jobs, up to ``most``, from which on one more brings less than ``_GAIN`` asks for."""
    jobs = 1
    while jobs < most and rate(jobs + 1) >= rate(jobs) * ((jobs + 1) / jobs) ** _GAIN:
        jobs += 1
    return jobs


def left_over(card: GpuSpec, load: ModelSet, workload: Workload = Workload()) -> int:
    """Return the bytes left beside the weights and one song; negative: so many are missing."""
    split = split_of(card, load, workload)
    lm_left = load.lm.memory - load.lm.weights - load.lm.song(workload) if load.lm else 0
    return min(lm_left, 0) + split.renderer - split.weights - split.working - split.song
