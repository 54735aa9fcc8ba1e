# SPDX-License-Identifier: Apache-2.0
"""Estimates how many concurrent jobs a GPU should have, and how many songs per minute it renders. Pure arithmetic.

The LM and the renderer share one GPU. The LM gets as many songs as increase the throughput and fit into its memory,
the renderer as many batches as a worker's stage holds; one more job is fetched or uploaded, and some are encoded. The
sum is the recommended number of workers (prefetch).

The rules are the worker's own: ``lm_choice.plan_lm`` for the LM's memory, ``MemoryBudget`` for the renderer's. The
measurements are in ``benchmarks``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND
from acestep_consumer.domain.edits import FRAMES_PER_SECOND
from acestep_consumer.policy import benchmarks
from acestep_consumer.policy.benchmarks import DIT_2B, REFERENCE, Backend, DitSize, GpuSpeed, LmSize
from acestep_consumer.policy.lm_memory import CONTEXT, MORE_ROWS, beside_weights, rows_for
from acestep_consumer.policy.memory_budget import (
    ENOUGH_TOKENS,
    PACKS,
    MemoryBudget,
    MemoryFootprint,
    StepGraphLimits,
)

Bound = Literal["memory", "renderer", "language model", "encoding"]

LEAST_WORKERS = 2
_MOST_IN_LM = MORE_ROWS // benchmarks.LM_SEQUENCES_PER_SONG
_GAIN = math.log2(1.1)
"""Doubling the jobs must increase throughput by at least a tenth; otherwise jobs only wait longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """A GPU: its memory in GiB (0: none) and its speed; of unknown speed, that of the measured GPU."""

    name: str
    vram_gb: float
    speed: GpuSpeed = REFERENCE

    @property
    def bytes(self) -> int:
        """Its memory in bytes."""
        return int(self.vram_gb * benchmarks.GIB)

    @property
    def compute(self) -> float:
        """Speed of matrix products, relative to the measured GPU."""
        return self.speed.tflops / REFERENCE.tflops

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth, relative to the measured GPU."""
        return self.speed.gigabytes_s / REFERENCE.gigabytes_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A request of the expected traffic. ``guided``: classifier-free guidance, which doubles the DiT's work."""

    duration_s: float = 300
    batch: int = 1
    thinking: bool = True
    steps: int = 8
    guided: bool = False
    audio_format: str = "mp3"

    @property
    def frames(self) -> int:
        """Latent frames of a song."""
        return math.ceil(self.duration_s * FRAMES_PER_SECOND)

    @property
    def tokens(self) -> int:
        """DiT tokens of a song in a step, over all guidance branches."""
        return math.ceil(self.duration_s * benchmarks.TOKENS_PER_SECOND) * (2 if self.guided else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LmSpec:
    """An LM on the GPU. ``memory``: bytes for weights and sequences together.

    ``beside``: it starts while the renderer does, which keeps some of that back.
    """

    model: str
    backend: Backend
    memory: int
    size: LmSize
    beside: bool = False

    @property
    def most_songs(self) -> int | None:
        """Songs that the backend's batch has rows for; None: any number."""
        on_vllm = self.backend == "vllm"
        return rows_for(self.memory, self.size.token_bytes) // benchmarks.LM_SEQUENCES_PER_SONG if on_vllm else None

    @property
    def weights(self) -> int:
        """Bytes of the weights and of what the backend takes beside them, keys and values."""
        if self.most_songs is None:
            return self.size.weights
        rows = self.most_songs * benchmarks.LM_SEQUENCES_PER_SONG
        return self.size.weights + beside_weights(rows, beside=self.beside)

    def song(self, workload: Workload) -> int:
        """Return the bytes of keys and values of a song with all its codes."""
        tokens = benchmarks.LM_PROMPT_TOKENS + math.ceil(workload.duration_s * CODES_PER_SECOND)
        return benchmarks.LM_SEQUENCES_PER_SONG * tokens * self.size.token_bytes

    def least(self, workload: Workload) -> int:
        """Return the bytes of keys and values without which it makes no song: vLLM does not start with less."""
        longest = 0 if self.most_songs is None else CONTEXT * self.size.token_bytes
        return max(self.song(workload), longest)

    def room(self, workload: Workload) -> int:
        """Return how many songs fit at once, by memory and by the rows of the batch."""
        left = self.memory - self.weights
        songs = left // self.song(workload) if left >= self.least(workload) else 0
        return songs if self.most_songs is None else min(songs, self.most_songs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSet:
    """The models on the GPU: DiTs (the first one is used), LM, and whether idle ones are offloaded to RAM.

    ``graphs``: the largest pack that is stepped by a CUDA graph; None: none is.
    """

    models: tuple[DitSize, ...] = (DIT_2B,)
    lm: LmSpec | None = None
    offload_models: bool = False
    offload_dit: bool = False
    pack_tokens: int = ENOUGH_TOKENS
    graphs: StepGraphLimits | None = None

    @property
    def weights(self) -> int:
        """Bytes of the renderer's weights on the GPU, and of the inputs of its CUDA graphs.

        With offloading only one component at a time.
        """
        own = [each * 2 for each in benchmarks.OWN_PARTS]
        shared = [each * 2 for each in benchmarks.SHARED_PARTS]
        dits = [model.weights for model in self.models]
        if self.offload_models:
            others = max(*own, *shared)
            return max(*dits, others) if self.offload_dit else sum(dits) + others
        loaded = sum(dits) + len(dits) * sum(own) + sum(shared) + benchmarks.LOADED_BEYOND_PARAMETERS
        return loaded + self.graph_bytes

    @property
    def graph_bytes(self) -> int:
        """Bytes of the inputs of CUDA graphs, which each model has."""
        return sum(model.graph_bytes(self.graphs) for model in self.models) if self.graphs else 0

    @property
    def moved(self) -> int:
        """Bytes that offloading copies to the GPU for each pack of songs."""
        if not self.offload_models:
            return 0
        dit = self.models[0].weights if self.offload_dit else 0
        return dit + sum(each * 2 for each in (*benchmarks.OWN_PARTS, *benchmarks.SHARED_PARTS))

    def footprint(self) -> MemoryFootprint:
        """Return the renderer's memory footprint, as it would measure it at start."""
        widest = max(model.hidden for model in self.models)
        return MemoryFootprint(
            weights=self.weights,
            token=benchmarks.STEP_BYTES_PER_TOKEN * widest // DIT_2B.hidden,
            condition_token=max(model.condition_bytes for model in self.models),
            tile=benchmarks.TILE_BYTES,
            frame=benchmarks.FRAME_BYTES,
        )

    def budget(self, gpu: GpuSpec) -> MemoryBudget:
        """Return the renderer's budget: the memory that the LM leaves."""
        lm = self.lm.memory if self.lm else 0
        limit = max(0, gpu.bytes - benchmarks.RESERVE_BYTES - lm)
        return MemoryBudget(limit=limit, footprint=self.footprint(), max_tokens=self.pack_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySplit:
    """Split of the GPU's memory, bytes: ``gpu`` = ``reserve`` + ``lm`` + ``renderer``.

    A song takes ``lm_song`` in the LM and ``song`` in the renderer.
    """

    gpu: int
    reserve: int
    lm: int
    lm_song: int
    renderer: int
    weights: int
    working: int
    song: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The estimate.

    Attributes:
        fits: whether the weights and one song fit.
        workers: concurrent jobs (``ACESTEP_QUEUE_WORKERS``).
        songs_a_minute: at best, with that many jobs; None if it does not fit or was not measured.
        bound_by: the bottleneck; None where ``songs_a_minute`` is None.
        lm_jobs: of the workers, those in the LM, with ``lm_songs`` of the ``lm_room`` songs that fit.
        render_jobs: those in the renderer, ``PACKS`` batches as in a worker, with ``render_songs`` of the
            ``render_room`` songs that fit in one.
        other_jobs: those being fetched, encoded or uploaded.
        lm_s: seconds of GPU time per song in the LM; ``render_s``: in the renderer.
        encoding_cores: CPU cores that encoding uses.
        split: how the memory is split; None without a GPU.
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


def lm_on_gpu(wanted: LmSpec, workload: Workload, *, backend: Backend | None) -> LmSpec:
    """Return the LM on ``backend``; without a configured one on vLLM, unless that has no room for a song.

    Where it has none beside a renderer that starts, it starts after it.
    """
    first = replace(wanted, backend=backend or "vllm")
    after = replace(first, beside=False)
    last = after if backend else replace(after, backend="pt")
    return next((each for each in (first, after) if each.room(workload)), last)


def split_of(gpu: GpuSpec, load: ModelSet, workload: Workload) -> MemorySplit:
    """Split the GPU's memory."""
    budget, lm = load.budget(gpu), load.lm
    return MemorySplit(
        gpu=gpu.bytes,
        reserve=min(benchmarks.RESERVE_BYTES, gpu.bytes),
        lm=lm.memory if lm else 0,
        lm_song=lm.song(workload) if lm else 0,
        renderer=budget.limit or 0,
        weights=load.weights,
        working=budget.working,
        song=budget.held(workload.frames, benchmarks.CONDITION_TOKENS),
    )


def render_room(split: MemorySplit) -> int:
    """Return how many songs fit in the renderer beside its weights and the largest step or decode."""
    return max(0, (split.renderer - split.weights - split.working) // split.song)


def capacity(gpu: GpuSpec, load: ModelSet, workload: Workload, cores: float = math.inf) -> Capacity:
    """Estimate what a GPU can do with these models, this workload and ``cores`` CPU cores for encoding."""
    if gpu.vram_gb <= 0:
        return Capacity(fits=True)
    split = split_of(gpu, load, workload)
    lm = load.lm if workload.thinking else None
    lm_room, room = lm.room(workload) if lm else 0, render_room(split)
    if room == 0 or (lm is not None and lm_room == 0) or (workload.thinking and lm is None):
        return Capacity(fits=False, lm_room=lm_room, render_room=room, split=split)
    return _SongTimes(gpu, load, lm, workload, load.budget(gpu).tokens, cores).capacity(split, lm_room, room)


@dataclass(frozen=True, slots=True)
class _SongTimes:
    """Times of one song on one GPU. ``pack``: most tokens of a step; ``cores``: CPU cores for encoding."""

    gpu: GpuSpec
    load: ModelSet
    lm: LmSpec | None
    workload: Workload
    pack: int
    cores: float

    def capacity(self, split: MemorySplit, lm_room: int, room: int) -> Capacity:
        batch = self.workload.batch
        rendering = self._render_jobs(room)
        render_s = self._render_s(min(room, rendering * batch))
        planning, asked = self._lm_jobs(lm_room, render_s), self._lm_jobs(_MOST_IN_LM, render_s)
        lm_songs = min(lm_room, planning * batch)
        lm_s = self._lm_s(lm_songs)
        on_gpu = self._on_gpu_a_second(lm_songs, render_s)
        rate = min(on_gpu, self._encoded_a_second)
        encoding = min(rate * self._encode_s, self.cores)
        other = max(1, math.ceil(encoding))  # a job encodes its songs one after the other
        bound: Bound = "renderer" if render_s >= lm_s else "language model"
        crowded = render_s > self._render_s(max(self.pack, batch)) or planning < asked
        if crowded or room < batch or (self.lm is not None and lm_room < batch):
            bound = "memory"
        if self._encoded_a_second <= on_gpu:
            bound = "encoding"
        return Capacity(
            fits=True,
            workers=planning + PACKS * rendering + other,
            songs_a_minute=60 * rate,
            bound_by=bound,
            lm_jobs=planning,
            lm_songs=lm_songs,
            lm_room=lm_room,
            render_jobs=PACKS * rendering,
            render_songs=min(room, rendering * batch),
            render_room=room,
            other_jobs=other,
            lm_s=lm_s,
            render_s=render_s,
            encoding_cores=encoding,
            split=split,
        )

    def _on_gpu_a_second(self, lm_songs: int, render_s: float) -> float:
        """Return the songs that the GPU makes a second, where the LM, with so many songs, and the renderer share it.

        With MPS they run at the same time, but neither faster than alone, nor both faster than the GPU's power allows.
        That was measured on Hopper, with many songs in the LM; elsewhere they count as taking turns.
        """
        lm_s = self._lm_s(lm_songs)
        by_turns = 1 / (lm_s + render_s)
        if self.lm is None or not self.gpu.speed.hopper or lm_songs < benchmarks.MPS_GAINS_FROM:
            return by_turns
        at_full_power = 1 / (self._lm_s(_MOST_IN_LM) + render_s)
        return min(benchmarks.MPS_GAIN * by_turns, benchmarks.MPS_FULL_GAIN * at_full_power, 1 / max(lm_s, render_s))

    @property
    def _encode_s(self) -> float:
        """CPU seconds to encode one song."""
        return self.workload.duration_s * benchmarks.ENCODE_S_PER_SECOND[self.workload.audio_format]

    @property
    def _encoded_a_second(self) -> float:
        return self.cores / self._encode_s

    def _render_jobs(self, room: int) -> int:
        """Return how many jobs fill a batch of the renderer."""
        songs = min(room, max(1, self.pack // self.workload.tokens))
        return max(1, songs // self.workload.batch)

    def _lm_jobs(self, room: int, render_s: float) -> int:
        """Return how many jobs fill the LM's steps, or suffice for the speed of encoding."""
        if self.lm is None:
            return 0
        batch = self.workload.batch

        def rate(jobs: int) -> float:
            return self._on_gpu_a_second(min(room, jobs * batch), render_s)

        most = _knee(max(1, room // batch), rate)
        with_mps = math.ceil(benchmarks.MPS_GAINS_FROM / batch)
        if most < with_mps <= room // batch and rate(with_mps) >= rate(most) * (with_mps / most) ** _GAIN:
            most = with_mps
        return next((jobs for jobs in range(1, most) if rate(jobs) >= self._encoded_a_second), most)

    def _lm_s(self, songs: int) -> float:
        """Return the GPU seconds for one song's codes. It reads weights and cache, so it scales with bandwidth."""
        if self.lm is None:
            return 0.0
        rate = benchmarks.lm_songs_a_minute(self.lm.size, self.lm.backend, songs, self.workload.duration_s)
        return 60 / rate / self.gpu.bandwidth

    def _render_s(self, songs: int) -> float:
        """Return the GPU seconds for one song in batches of ``songs``, or of as many as fit into a step.

        A step consists of matrix products, and is never faster than its kernel launches on the host. The VAE is limited
        by compute and bandwidth in turn: the slower one counts.
        """
        packed = min(songs, max(1, self.pack // self.workload.tokens))
        size = self.load.models[0].parameters / DIT_2B.parameters
        token_s = benchmarks.STEP_S_PER_TOKEN * size / self.gpu.compute
        step = max(packed * self.workload.tokens * token_s, benchmarks.STEP_FLOOR_S)
        fused = self.gpu.speed.hopper
        decode_s = benchmarks.FUSED_DECODE_S_PER_SECOND if fused else benchmarks.DECODE_S_PER_SECOND
        decode = decode_s * self.workload.duration_s
        slowest = min(self.gpu.compute, self.gpu.bandwidth)
        moving = self.load.moved / (benchmarks.HOPPER_BUS_BYTES_S if fused else benchmarks.BUS_BYTES_S)
        return (self.workload.steps * step + moving) / packed + decode / slowest + benchmarks.PREPARE_S


def _knee(most: int, rate: Callable[[int], float]) -> int:
    """Return the number of jobs, up to ``most``, beyond which one more gains less than ``_GAIN``."""
    jobs = 1
    while jobs < most and rate(jobs + 1) >= rate(jobs) * ((jobs + 1) / jobs) ** _GAIN:
        jobs += 1
    return jobs


def left_over(gpu: GpuSpec, load: ModelSet, workload: Workload = Workload()) -> int:
    """Return the bytes left beside the weights and one song, in the smallest batches; negative: missing."""
    split, working = split_of(gpu, load, workload), load.budget(gpu).least_working
    lm_left = load.lm.memory - load.lm.weights - load.lm.least(workload) if load.lm else 0
    return min(lm_left, 0) + split.renderer - split.weights - working - split.song
