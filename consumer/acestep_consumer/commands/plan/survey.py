# SPDX-License-Identifier: Apache-2.0
"""Applies a worker's own rules to a GPU and a workload: tier table, choice of the LM, memory budget of the renderer.

The measurements behind the songs per minute are in ``acestep_consumer.policy.benchmarks``.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from acestep_consumer.commands.plan.answer import (
    ExpectedSongsPart,
    FitPart,
    GpuPart,
    LmPart,
    MemoryPart,
    ModelPart,
    OffloadPart,
    PlanReport,
    TierLimitsPart,
    WorkersPart,
    WorkloadPart,
)
from acestep_consumer.commands.plan.gpu import DetectedGpu
from acestep_consumer.commands.plan.model_size import size_of_dit
from acestep_consumer.commands.terminal import plural
from acestep_consumer.config.cores import usable_cores
from acestep_consumer.config.settings import Settings
from acestep_consumer.engine.planner.registry import lm_request
from acestep_consumer.policy import benchmarks
from acestep_consumer.policy.admit import TURBO_STEPS
from acestep_consumer.policy.benchmarks import (
    BUS_BYTES_S,
    DIT_2B,
    DIT_SIZES,
    GIB,
    HOPPER_BUS_BYTES_S,
    LM_SIZES,
    MEASURED_ON,
    REFERENCE,
    UNCOMPILED,
    WHOLE_WORKERS,
    DitSize,
)
from acestep_consumer.policy.lm_choice import LmPlan, LmRequest, plan_lm
from acestep_consumer.policy.memory_budget import StepGraphLimits
from acestep_consumer.policy.sizing import Capacity, GpuSpec, LmSpec, ModelSet, Workload, capacity, left_over
from acestep_consumer.policy.tiers import (
    LMS,
    MIN_DURATION_S,
    NEWER,
    OFFLOAD_BELOW_GB,
    OFFLOADABLE,
    Tier,
    TierTable,
    offloads,
    others,
)

_INT8_BELOW_GB = 20
_INT8_SHOWN_TO_GB = 24.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuestion:
    """The options of ``plan``.

    ``vram_gb`` and ``card`` None: this machine's. ``guided`` None: off for turbo models. ``cores`` None: this machine's
    for its own GPU, else enough.
    """

    vram_gb: float | None = None
    card: str | None = None
    duration_s: float = 300
    batch: int = 1
    thinking: bool = True
    steps: int = 8
    guided: bool | None = None
    audio_format: str = "mp3"
    cores: int | None = None


class PlanSurvey:
    """Calculates the report for a GPU and a workload."""

    def __init__(self, settings: Settings, table: TierTable, found: DetectedGpu, question: PlanQuestion) -> None:
        self._settings = settings
        self._engine = settings.engine
        self._table = table
        self._found = found
        self._asked = question
        self._tier = table.tier_of(found.vram_gb)
        model = benchmarks.find_gpu(found.name)
        self._speed = model.speed if model else None
        self._gpu = GpuSpec(name=found.name, vram_gb=found.vram_gb, speed=self._speed or REFERENCE)
        self._names = tuple(dict.fromkeys(self._engine.models))
        self._int8 = self._engine.quantization == "int8"
        self._dits = {name: size_of_dit(name, self._engine.checkpoint_dir) for name in self._names}
        self._lm_wish = self._lm_request()
        self._lm_plan = plan_lm(self._lm_wish, self._tier, found.vram_gb)
        self._workload = self._clamped()
        self._lm = self._on_gpu(self._lm_plan, self._workload) if self._lm_plan and not self._lm_is_apart() else None
        offload = self._offloads()
        self._load = ModelSet(
            models=tuple(replace(dit.size, int8=self._int8) for dit in self._dits.values()),
            lm=self._lm,
            offload_models=offload,
            offload_dit=offload and self._engine.offload_dit is not False,
            pack_tokens=self._engine.pack_tokens,
            graphs=None if offload or not self._compiles() else StepGraphLimits.on_a_device_with(found.vram_gb),
        )
        self._cores = self._cores_there()
        self._capacity = capacity(self._gpu, self._load, self._workload, self._cores or math.inf)

    def plan(self) -> PlanReport:
        """Return the report."""
        return PlanReport(
            card=self._gpu_part(),
            tier=_tier_part(self._tier, self._table),
            other_tiers=tuple(_tier_part(each.tier_of(self._found.vram_gb), each) for each in others(self._table)),
            offload=self._offload_part(),
            models=tuple(ModelPart(name=name, size=dit.size.name) for name, dit in self._dits.items()),
            lm=self._lm_part(),
            quantization=self._engine.quantization,
            possible=tuple(self._possible(int8=self._int8)),
            possible_int8=tuple(self._possible(int8=True)) if self._shows_int8() else (),
            fits=self._capacity.fits,
            memory=_memory_part(self._capacity, self._load),
            workload=self._workload_part(),
            workers=self._workers_part(),
            songs=self._songs_part(),
            notes=tuple(self._notes()),
        )

    def _lm_request(self) -> LmRequest:
        wish = lm_request(self._engine, os.environ)
        elsewhere = self._asked.card is not None or self._asked.vram_gb is not None
        return replace(wish, on_disk=None) if elsewhere else wish

    def _on_gpu(self, plan: LmPlan, workload: Workload) -> LmSpec:
        return plan.on_gpu(workload, self._found.vram_gb, len(self._names))

    def _compiles(self) -> bool:
        return self._found.kind == "cuda" and self._engine.compile is not False

    def _lm_is_apart(self) -> bool:
        """Whether the LM is on another device than the renderer."""
        lm, renderer = (each.strip().lower() for each in (self._engine.lm_device, self._engine.device))
        own = {"auto", renderer, *(("cuda", "cuda:0") if renderer in ("auto", "cuda", "cuda:0") else ())}
        return lm not in own

    def _cores_there(self) -> int | None:
        if self._asked.cores is not None:
            return self._asked.cores
        return usable_cores() if self._found.by in ("nvidia-smi", "torch") else None

    def _thinks(self) -> bool:
        return self._asked.thinking and self._lm_plan is not None

    def _clamped(self) -> Workload:
        """Return the workload within the tier's limits, without the LM if that is on another device or not loaded."""
        asked, thinks = self._asked, self._thinks()
        longest, most = (
            (self._tier.max_seconds_with_lm, self._tier.max_batch_with_lm)
            if thinks
            else (self._tier.max_seconds, self._tier.max_batch)
        )
        turbo = self._dits[self._names[0]].turbo
        return Workload(
            duration_s=min(max(asked.duration_s, MIN_DURATION_S), longest),
            batch=min(asked.batch, most),
            thinking=thinks and not self._lm_is_apart(),
            steps=min(asked.steps, TURBO_STEPS) if turbo else asked.steps,
            guided=not turbo and asked.guided is not False,
            audio_format=asked.audio_format,
        )

    def _offloads(self) -> bool:
        found = self._found
        return found.vram_gb > 0 and offloads(found.kind, found.vram_gb, self._engine.offload)

    def _gpu_part(self) -> GpuPart:
        known = self._speed is not None
        return GpuPart(
            name=self._found.name,
            vram_gb=round(self._found.vram_gb, 2),
            found_by=self._found.by,
            compute=round(self._gpu.compute, 3) if known else None,
            bandwidth=round(self._gpu.bandwidth, 3) if known else None,
        )

    def _offload_part(self) -> OffloadPart:
        if not self._found.vram_gb or self._found.kind not in OFFLOADABLE:
            because = "no GPU"
        elif self._engine.offload is not None:
            because = "ACESTEP_OFFLOAD_TO_CPU is set"
        else:
            side = "less than" if self._load.offload_models else "at least"
            because = f"the GPU has {side} {OFFLOAD_BELOW_GB:g} GB"
        return OffloadPart(models=self._load.offload_models, dit=self._load.offload_dit, because=because)

    def _lm_part(self) -> LmPart | None:
        if self._lm_plan is None:
            return None
        lm = self._on_gpu(self._lm_plan, self._workload)
        return LmPart(
            model=lm.model,
            backend=lm.backend,
            backend_is_set=self._lm_plan.backend is not None,
            memory_gb=round(self._lm_plan.memory_gb, 1),
            memory_gib=_gib(lm.memory),
            weights_gib=_gib(lm.size.weights),
            songs_at_once=lm.room(self._workload),
        )

    def _shows_int8(self) -> bool:
        return not self._int8 and self._found.vram_gb <= _INT8_SHOWN_TO_GB

    def _possible(self, *, int8: bool) -> Iterator[FitPart]:
        """Yield every pair of a DiT size and an LM (the tier's and the configured one), with songs per minute."""
        if not self._found.vram_gb:
            return
        configured = () if self._lm_plan is None else (self._lm_plan.model,)
        for name in dict.fromkeys((None, *self._tier.lms, *configured)):
            lm = self._listed(name, int8=int8)
            for size in dict.fromkeys(replace(size, int8=int8) for size in (*DIT_SIZES, *self._load.models)):
                load = self._with(size, lm)
                left = left_over(self._gpu, load)
                work = replace(self._workload, thinking=lm is not None and self._workload.thinking)
                rate = capacity(self._gpu, load, work, self._cores or math.inf).songs_a_minute if left >= 0 else None
                yield FitPart(
                    dit=size.name,
                    lm=name,
                    backend=lm.backend if lm else None,
                    fits=left >= 0,
                    left_gib=_gib(left),
                    songs_a_minute=None if rate is None else round(rate, 1),
                )

    def _listed(self, name: str | None, *, int8: bool) -> LmSpec | None:
        wish = replace(self._lm_wish, init=name is not None, model=name, int8=int8)
        wanted = plan_lm(wish, self._tier, self._found.vram_gb)
        return self._on_gpu(wanted, Workload()) if wanted else None

    def _with(self, size: DitSize, lm: LmSpec | None) -> ModelSet:
        return replace(self._load, models=(size,), lm=lm)

    def _workload_part(self) -> WorkloadPart:
        work = self._workload
        return WorkloadPart(
            model=self._names[0],
            duration_s=work.duration_s,
            batch=work.batch,
            thinking=self._thinks(),
            steps=work.steps,
            guided=work.guided,
            audio_format=work.audio_format,
        )

    def _workers_part(self) -> WorkersPart:
        found = self._capacity
        return WorkersPart(
            recommended=found.workers,
            set_now=self._settings.broker.queue_workers,
            in_lm=found.lm_jobs,
            in_renderer=found.render_jobs,
            elsewhere=found.other_jobs,
            bound_by=found.bound_by,
            because=self._because(),
        )

    def _songs_part(self) -> ExpectedSongsPart:
        found = self._capacity
        return ExpectedSongsPart(
            a_minute=None if found.songs_a_minute is None else round(found.songs_a_minute, 1),
            lm_s=round(found.lm_s, 4),
            renderer_s=round(found.render_s, 4),
            encoding_cores=round(found.encoding_cores, 1),
            rests_on=self._rests_on(),
        )

    def _because(self) -> str:
        """Return the reason, in one line, for not recommending more workers."""
        found, work = self._capacity, self._workload
        if not self._found.vram_gb:
            return "no CPU measurements: one job renders while another is fetched or uploaded"
        if not found.fits:
            return self._missing()
        takes = f"a song takes {found.render_s:.2f} s of GPU time in the renderer"
        if self._workload.thinking:
            takes += f" and {found.lm_s:.2f} s in the LM"
        if found.bound_by == "encoding":
            return f"limited by encoding {work.audio_format} on {self._cores} CPU cores (flac needs fewer); {takes}"
        if found.bound_by != "memory":
            return f"limited by the {found.bound_by}: {takes}; more concurrent jobs would mostly wait"
        room = f"the renderer has room for {plural(found.render_room, 'song')} of {work.duration_s:g} s"
        if work.thinking:
            room = f"the LM has room for {plural(found.lm_room, 'song')} of {work.duration_s:g} s, {room}"
        return f"limited by memory: {room}; {takes}"

    def _missing(self) -> str:
        missing = -left_over(self._gpu, self._load, self._workload) / GIB
        possible = self._possible(int8=self._int8)
        smaller = [part for part in possible if part.fits and part.dit == self._load.models[0].name]
        with_lm = [part.lm for part in smaller if part.lm and part.lm != self._lm.model] if self._lm else []
        text = f"does not fit: {max(missing, 0.1):.1f} GiB short"
        ways = [f"ACESTEP_LM_MODEL_PATH={with_lm[-1]}"] if with_lm else []
        if not self._int8 and any(self._is_set(part) and part.fits for part in self._possible(int8=True)):
            ways.append("ACESTEP_QUANTIZATION=int8")
        if ways:
            return f"{text}; {' or '.join(ways)} fits"
        if self._lm is not None and smaller:
            return f"{text}; fits without the LM: ACESTEP_INIT_LLM=false"
        if not self._load.offload_models:
            return f"{text}; ACESTEP_OFFLOAD_TO_CPU=true keeps idle models in RAM"
        return f"{text}; shorter songs or a smaller model may fit"

    def _is_set(self, part: FitPart) -> bool:
        """Whether it is the pair that a worker would load, alone."""
        lm = self._lm.model if self._lm else None
        return len(self._dits) == 1 and (part.dit, part.lm) == (self._load.models[0].name, lm)

    def _rests_on(self) -> str:
        origin = f"calculated from times measured on one {MEASURED_ON}, full shapes with random weights"
        if not self._found.vram_gb:
            return "none (no CPU measurements)"
        if self._speed is None:
            return f"{origin}; unknown GPU: the figures are an H200's, expect less"
        if self._speed == REFERENCE:
            return f"{origin}; whole workers there made {WHOLE_WORKERS}"
        mine, reference = self._speed, REFERENCE
        without = "" if mine.hopper else ", without fused decoder and without MPS's gain, both measured there alone"
        return (
            f"{origin}, scaled by data sheets: {mine.tflops:g} of {reference.tflops:g} TFLOP/s (bf16, dense), "
            f"{mine.gigabytes_s:g} of {reference.gigabytes_s:g} GB/s{without}; an estimate, not a measurement"
        )

    def _notes(self) -> Iterator[str]:
        if self._found.why:
            yield f"no GPU detected: {self._found.why}. Use --card or --vram to plan for one"
        if self._speed is None and self._found.vram_gb:
            yield f"--card knows the speed of: {', '.join(benchmarks.gpu_names())}"
        if self._found.vram_gb and not self._compiles():
            yield f"the models run uncompiled here: {UNCOMPILED}"
        if self._int8:
            yield "int8 was not measured: memory is calculated, and speed is that of bfloat16"
        elif self._table is NEWER and 0 < self._found.vram_gb < _INT8_BELOW_GB:
            yield f"{NEWER.version} counts on weights in int8 on this GPU: ACESTEP_QUANTIZATION=int8"
        if self._lm_plan:
            yield from self._lm_plan.warnings
            if self._lm_plan.trade_off:
                yield f"{self._lm_plan.model} is the default here: {self._lm_plan.trade_off}"
        yield from self._notes_on_workload()
        yield from self._notes_on_models()
        yield from self._notes_on_host()

    def _notes_on_workload(self) -> Iterator[str]:
        asked, work = self._asked, self._workload
        if asked.thinking and self._lm_plan is None:
            reason = "ACESTEP_INIT_LLM=true loads one" if self._tier.lms else f"{self._tier.name} allows none"
            yield f"no LM is loaded, so requests with `thinking` will fail ({reason}); calculated without it"
        clamps = (("duration", asked.duration_s, work.duration_s), ("batch", asked.batch, work.batch))
        for name, wanted, applied in clamps:
            if wanted != applied:
                yield f"{name} {wanted:g} exceeds {self._tier.name}'s limits: calculated with {applied:g}"
        if asked.steps > work.steps:
            yield f"turbo models take at most {TURBO_STEPS} steps: calculated with {work.steps}"
        if asked.guided and not work.guided:
            yield "turbo models are not guided: calculated without guidance"

    def _notes_on_models(self) -> Iterator[str]:
        for name, dit in self._dits.items():
            if not dit.on_disk and not name.rstrip("/").rpartition("/")[2].lower().startswith("acestep-v15"):
                yield f"unknown size of {name}: assumed {dit.size.name}"
        size = self._load.models[0]
        if size.name != DIT_2B.name and self._found.vram_gb:
            scaled = "speed scaled from the 2B model by parameters, memory calculated from its shapes"
            yield f"{size.name.partition(' ')[0]} was not measured: {scaled}"
        if self._lm_is_apart() and self._lm_plan:
            yield f"the LM is on {self._engine.lm_device}: its memory and time are not included"
        published = None if self._lm is None else replace(self._lm.size, int8=False)
        if self._lm is not None and published not in LM_SIZES.values():
            billions = self._lm.size.parameters / 1e9
            yield f"{self._lm.model} ({billions:.2g}B) was not measured: speed of the next larger LM, or scaled from it"
        if self._lm is not None and self._lm.backend == "pt" and published != LM_SIZES[LMS[1]]:
            yield "transformers was measured with the 1.7B LM only: speed scaled like vLLM's"
        if self._load.offload_models:
            bus, generation = (HOPPER_BUS_BYTES_S, 5) if self._gpu.speed.hopper else (BUS_BYTES_S, 4)
            counted = f"counted at {bus / 1e9:g} GB/s (PCIe {generation})"
            yield f"offloaded weights are copied to the GPU for each batch, {counted}; a slower bus means fewer songs"
        if self._engine.lm_offload and self._lm:
            yield "the time to copy the offloaded LM is not included; expect fewer songs per minute"

    def _notes_on_host(self) -> Iterator[str]:
        found = self._capacity
        if found.encoding_cores > 1:
            known = "set --cores if there are fewer" if self._cores is None else f"calculated with {self._cores}"
            audio_format = self._workload.audio_format
            yield f"encoding {audio_format} uses {math.ceil(found.encoding_cores)} CPU cores; {known}"
        most = self._settings.broker.queue_workers_max
        if found.workers > most:
            yield (
                f"ACESTEP_QUEUE_WORKERS=auto stops at ACESTEP_QUEUE_WORKERS_MAX = {most}: set it to "
                f"{found.workers} or more"
            )


def _tier_part(tier: Tier, table: TierTable) -> TierLimitsPart:
    return TierLimitsPart(
        name=tier.name,
        table_version=table.version,
        max_duration_s_with_lm=tier.max_seconds_with_lm,
        max_duration_s=tier.max_seconds,
        max_batch_with_lm=tier.max_batch_with_lm,
        max_batch=tier.max_batch,
    )


def _memory_part(found: Capacity, load: ModelSet) -> MemoryPart | None:
    split = found.split
    if split is None:
        return None
    return MemoryPart(
        card_gib=_gib(split.gpu),
        reserve_gib=_gib(split.reserve),
        lm_gib=_gib(split.lm),
        lm_song_gib=_gib(split.lm_song),
        renderer_gib=_gib(split.renderer),
        renderer_weights_gib=_gib(split.weights),
        renderer_graphs_gib=_gib(load.graph_bytes),
        renderer_working_gib=_gib(split.working),
        renderer_song_gib=_gib(split.song),
    )


def _gib(size: float) -> float:
    return round(size / GIB, 2)
