# SPDX-License-Identifier: Apache-2.0
"""What a card can do: properties that must hold whatever the measured figures are, and a few that pin them down."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from acestep_consumer.policy import benchmarks
from acestep_consumer.policy.benchmarks import DIT_2B, DIT_SIZES, DIT_XL, GIB, REFERENCE, Backend, DitSize, LmSize
from acestep_consumer.policy.lm_choice import LmRequest, plan_lm, renderer_share
from acestep_consumer.policy.memory_budget import PACKS, StepGraphLimits
from acestep_consumer.policy.sizing import (
    LEAST_WORKERS,
    Capacity,
    GpuSpec,
    ModelSet,
    Workload,
    capacity,
    left_over,
    split_of,
)
from acestep_consumer.policy.tiers import BUILT_IN, LMS, OFFLOAD_BELOW_GB

SIZES = st.floats(min_value=1, max_value=300)
WORKLOADS = st.builds(
    Workload,
    duration_s=st.floats(min_value=10, max_value=600),
    batch=st.integers(1, 8),
    thinking=st.booleans(),
    steps=st.integers(1, 100),
    guided=st.booleans(),
    audio_format=st.sampled_from(sorted(benchmarks.ENCODE_S_PER_SECOND)),
)
Load = tuple[tuple[DitSize, ...], str | None]
_DITS: tuple[tuple[DitSize, ...], ...] = ((DIT_2B,), (DIT_XL,), (DIT_2B, DIT_XL))
LOADS: st.SearchStrategy[Load] = st.tuples(st.sampled_from(_DITS), st.sampled_from([None, *LMS]))


def load_of(vram_gb: float, models: tuple[DitSize, ...], lm: str | None, workload: Workload) -> ModelSet:
    """The load as a worker on such a card would have it; None is the tier's own choice of an LM."""
    plan = plan_lm(LmRequest(init=True, model=lm), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    offload = vram_gb < OFFLOAD_BELOW_GB
    return ModelSet(
        models=models,
        lm=plan.on_gpu(workload, vram_gb, len(models)),
        offload_models=offload,
        offload_dit=offload,
        graphs=None if offload else StepGraphLimits.on_a_device_with(vram_gb),
    )


def on(vram_gb: float, workload: Workload, load: Load = ((DIT_2B,), None)) -> Capacity:
    return capacity(GpuSpec(name="H200", vram_gb=vram_gb), load_of(vram_gb, *load, workload), workload)


def _backend_on(vram_gb: float, workload: Workload, load: Load) -> str | None:
    lm = load_of(vram_gb, *load, workload).lm
    return lm.backend if lm else None


@given(SIZES, SIZES, WORKLOADS, LOADS)
def test_more_memory_never_means_fewer_workers_or_songs_within_a_tier(
    one: float, other: float, workload: Workload, load: Load
) -> None:
    less, more = sorted((one, other))
    assume(BUILT_IN.tier_of(less) == BUILT_IN.tier_of(more))
    models = {(lm.model, lm.backend) for size in (less, more) if (lm := load_of(size, *load, workload).lm)}
    assume(len(models) == 1)
    before, after = on(less, workload, load), on(more, workload, load)
    assert after.fits >= before.fits
    assert after.workers >= before.workers
    assert (after.songs_a_minute or 0) >= (before.songs_a_minute or 0) * (1 - 1e-9)


@given(SIZES, WORKLOADS, LOADS)
def test_what_is_recommended_fits_byte_by_byte(vram_gb: float, workload: Workload, load: Load) -> None:
    found = on(vram_gb, workload, load)
    assume(found.fits)
    loaded = load_of(vram_gb, *load, workload)
    footprint = loaded.footprint()
    frames = -(-workload.duration_s * 25 // 1)
    song = frames * footprint.frame + benchmarks.CONDITION_TOKENS * footprint.condition_token
    budget = loaded.budget(GpuSpec(name="H200", vram_gb=vram_gb))
    working = max(budget.tokens * footprint.token, budget.tiles * footprint.tile)
    renderer = footprint.weights + working + found.render_songs * song
    lm = loaded.lm
    assert lm is not None
    if workload.thinking:
        assert found.lm_songs >= 1
        assert lm.weights + found.lm_songs * lm.song(workload) <= lm.memory
    assert found.render_songs >= 1
    assert renderer + lm.memory + benchmarks.RESERVE_BYTES <= vram_gb * GIB


@given(SIZES, WORKLOADS, LOADS)
def test_the_jobs_add_up_and_there_are_at_least_two(vram_gb: float, workload: Workload, load: Load) -> None:
    found = on(vram_gb, workload, load)
    assert found.workers >= LEAST_WORKERS
    assert found.workers == found.lm_jobs + found.render_jobs + found.other_jobs
    assert found.fits is (found.songs_a_minute is not None)
    assert (found.bound_by is None) is (found.songs_a_minute is None)


@given(SIZES, WORKLOADS, LOADS, st.floats(min_value=1.25, max_value=10))
def test_longer_songs_are_fewer_a_minute(vram_gb: float, workload: Workload, load: Load, times: float) -> None:
    longer = replace(workload, duration_s=workload.duration_s * times)
    short, long = on(vram_gb, workload, load), on(vram_gb, longer, load)
    assume(short.songs_a_minute is not None and long.songs_a_minute is not None)
    # A song too long for vLLM's share of a small card is planned by transformers, which has room for more at once.
    assume(_backend_on(vram_gb, workload, load) == _backend_on(vram_gb, longer, load))
    assert (long.songs_a_minute or 0) < (short.songs_a_minute or 0)


@given(SIZES, WORKLOADS)
def test_guidance_steps_and_thinking_cost_songs(vram_gb: float, workload: Workload) -> None:
    plain = replace(workload, guided=False, thinking=False)
    at_best = on(vram_gb, plain)
    assume(at_best.fits)
    for harder in (
        replace(plain, guided=True),
        replace(plain, steps=plain.steps * 2),
        replace(plain, thinking=True),
    ):
        assert (on(vram_gb, harder).songs_a_minute or 0) <= (at_best.songs_a_minute or 0)


@given(SIZES, WORKLOADS, st.integers(1, 128))
def test_too_few_processor_cores_bound_the_songs(vram_gb: float, workload: Workload, cores: int) -> None:
    load, card = load_of(vram_gb, (DIT_2B,), None, workload), GpuSpec(name="H200", vram_gb=vram_gb)
    found, enough = capacity(card, load, workload, cores), capacity(card, load, workload)
    assume(enough.fits)
    assert found.encoding_cores <= cores * (1 + 1e-9)
    assert (found.bound_by == "encoding") is (enough.encoding_cores > cores)


@pytest.mark.parametrize("name", benchmarks.gpu_names())
def test_a_slower_card_makes_fewer_songs_than_the_measured_one(name: str) -> None:
    model = benchmarks.find_gpu(f"NVIDIA {name}")
    assert model is not None
    assert model.name == f"NVIDIA {name}"
    load = load_of(80, (DIT_2B,), None, Workload())
    mine = capacity(GpuSpec(name=name, vram_gb=80, speed=model.speed), load, Workload()).songs_a_minute or 0
    reference = capacity(GpuSpec(name="H200", vram_gb=80), load, Workload()).songs_a_minute or 0
    assert mine <= reference
    assert (mine == reference) is (name == "H200")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("l40s", "NVIDIA L40S"),
        ("L4", "NVIDIA L4"),
        ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090"),
        ("RTX 3090", "NVIDIA GeForce RTX 3090"),
        ("rtx3090", "NVIDIA GeForce RTX 3090"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("RTX 3090 Ti", "NVIDIA GeForce RTX 3090 Ti"),
        ("rtx-4080", "NVIDIA GeForce RTX 4080"),
        ("RTX A6000", "NVIDIA RTX A6000"),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("A100 40GB SXM4", "NVIDIA A100-SXM4-40GB"),
        ("A100 80GB", "NVIDIA A100 80GB PCIe"),
        ("H100", "NVIDIA H100 PCIe"),
        ("NVIDIA GeForce RTX 3090 24GB", "NVIDIA GeForce RTX 3090"),
        ("a100-80g", "NVIDIA A100 80GB PCIe"),
        ("L4 24 GB", "NVIDIA L4"),
    ],
)
def test_a_card_is_found_by_its_name_or_a_part_of_it_and_the_slowest_counts(name: str, found: str) -> None:
    model = benchmarks.find_gpu(name)
    assert model is not None
    assert model.name == found


@pytest.mark.parametrize(
    "name",
    [
        "RTX 3060 Ti",
        "RTX",
        "80GB",
        "80g",
        "RTX 4090 48GB",
        "RTX 3060 Ti 8GB",
        "",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "AMD Instinct MI300X",
        "H100 NVL",
        "some card",
    ],
)
def test_another_card_is_not_taken_for_one_that_is_known(name: str) -> None:
    assert benchmarks.find_gpu(name) is None


@pytest.mark.parametrize("backend", ["vllm", "pt"])
@pytest.mark.parametrize("size", [*benchmarks.LM_SIZES.values(), LmSize(8_000_000_000, 36)])
def test_more_songs_in_the_language_model_are_more_songs_a_minute(size: LmSize, backend: Backend) -> None:
    most = benchmarks.lm_gains_to(size, backend)
    rates = [benchmarks.lm_songs_a_minute(size, backend, songs, 300) for songs in range(1, most + 1)]
    assert most >= 64
    assert all(after > before for before, after in pairwise(rates))
    assert benchmarks.lm_songs_a_minute(size, backend, 1_000, 300) == pytest.approx(rates[-1])


def test_a_language_model_of_another_size_is_as_fast_as_the_next_larger_one_or_slower_than_the_largest() -> None:
    def rate(size: LmSize) -> float:
        return benchmarks.lm_songs_a_minute(size, "vllm", 16, 300)

    small, middle, large = benchmarks.LM_SIZES.values()
    assert rate(LmSize(100_000_000, 8)) == rate(small)
    assert rate(LmSize(1_200_000_000, 28)) == rate(middle)
    assert rate(LmSize(2 * large.parameters, 36)) == pytest.approx(rate(large) / 2)


def test_the_measured_points_are_met_exactly() -> None:
    middle = benchmarks.LM_SIZES[LMS[1]]
    points = {songs: benchmarks.lm_songs_a_minute(middle, "vllm", songs, 300) for songs in (1, 4, 16, 64)}
    assert points == pytest.approx({1: 18.1, 4: 48, 16: 168, 64: 350})
    assert benchmarks.lm_songs_a_minute(middle, "pt", 64, 300) == pytest.approx(166)
    assert benchmarks.lm_songs_a_minute(middle, "vllm", 64, 150) == pytest.approx(700)


@pytest.mark.parametrize(("songs", "measured"), [(84, 460), (96, 416), (128, 446)])
def test_the_language_model_alone_makes_what_was_measured_with_more_than_64_songs(songs: int, measured: int) -> None:
    """At the power limit of an H200, where it varies."""
    middle = benchmarks.LM_SIZES[LMS[1]]
    assert benchmarks.lm_songs_a_minute(middle, "vllm", songs, 300) == pytest.approx(measured, rel=0.06)


def test_a_large_card_has_room_for_as_many_songs_as_the_language_models_batch_has_rows_for() -> None:
    lm = load_of(141, (DIT_2B,), LMS[1], Workload()).lm
    assert lm is not None
    assert lm.room(Workload(duration_s=30)) == 128
    assert 64 < lm.room(Workload(duration_s=300)) < 128


def test_the_shapes_give_the_bytes_that_were_measured() -> None:
    assert ModelSet().weights / GIB == pytest.approx(6.2, abs=0.02)
    graphs = StepGraphLimits.on_a_device_with(141)
    assert ModelSet(graphs=graphs).weights / GIB == pytest.approx(6.2 + 0.43, abs=0.02)
    assert ModelSet(models=(DIT_2B, DIT_2B), graphs=graphs).graph_bytes == 2 * DIT_2B.graph_bytes(graphs)
    assert DIT_2B.condition_bytes == 2 * 98_304
    assert benchmarks.LM_SIZES[LMS[1]].token_bytes == 114_688


def test_both_share_the_time_of_one_card() -> None:
    found = on(80, Workload(duration_s=600), ((DIT_2B,), LMS[1]))
    assert found.lm_songs == 31
    assert found.songs_a_minute == pytest.approx(1.14 * 60 / (found.lm_s + found.render_s))
    # 8 steps of 7,500 tokens, the fused decode of 600 s, and the preparation.
    assert found.render_s == pytest.approx(8 * 7500 * 6.2e-6 + 0.2 + 0.003)


@pytest.mark.parametrize(
    ("workload", "low", "high"),
    [
        (Workload(audio_format="flac"), 144, 147),
        (Workload(audio_format="flac", thinking=False), 205, 219),
        (Workload(audio_format="flac", thinking=False, duration_s=30), 1_850, 1_950),
    ],
)
def test_the_estimates_for_an_h200_are_those_of_whole_workers_there(workload: Workload, low: int, high: int) -> None:
    """With the 1.7B LM, 96 jobs at once; without thinking 32."""
    card, both = GpuSpec(name="H200", vram_gb=141), load_of(141, (DIT_2B,), LMS[1], workload)
    assert low <= (capacity(card, both, workload, 16).songs_a_minute or 0) <= high


def test_more_songs_in_the_language_model_do_not_go_beyond_the_cards_power() -> None:
    """141 songs a minute were made with 64 jobs, 145 with 96."""
    card = GpuSpec(name="H200", vram_gb=141)
    load = load_of(141, (DIT_2B,), LMS[1], Workload())
    assert load.lm is not None
    rates = [
        capacity(card, replace(load, lm=replace(load.lm, memory=int(size * 1e9))), Workload()).songs_a_minute or 0
        for size in (27, 36, 54)
    ]
    assert rates == pytest.approx([141, 145, 145], rel=0.01)


def test_the_renderer_is_counted_with_as_many_batches_as_a_workers_stage_holds() -> None:
    plain = Workload(thinking=False, audio_format="flac")
    assert on(141, plain).render_jobs == PACKS * 2  # of 3,750 tokens each, in a batch of 8,192
    assert on(141, replace(plain, duration_s=30)).render_jobs == PACKS * 21
    assert on(16, plain).render_jobs == PACKS  # there is room for one


@given(st.floats(16, 300), st.sampled_from([None, *LMS]))
def test_the_renderers_share_is_the_one_that_a_worker_sets(vram_gb: float, lm: str | None) -> None:
    plan = plan_lm(LmRequest(init=True, model=lm), BUILT_IN.tier_of(vram_gb), vram_gb)
    assert plan is not None
    gpu = GpuSpec(name="", vram_gb=vram_gb)
    split = split_of(gpu, ModelSet(lm=plan.on_gpu(Workload(), vram_gb, 1)), Workload())
    assert split.renderer / GIB == pytest.approx(renderer_share(plan, vram_gb), abs=1e-6)


def test_cards_of_other_generations_take_turns_and_decode_without_fused_kernels() -> None:
    load = load_of(80, (DIT_2B,), LMS[1], Workload())
    hopper, other = (
        capacity(GpuSpec(name="", vram_gb=80, speed=replace(REFERENCE, hopper=hopper)), load, Workload(), 1_000)
        for hopper in (True, False)
    )
    assert other.songs_a_minute == pytest.approx(60 / (other.lm_s + other.render_s))
    assert other.render_s - hopper.render_s == pytest.approx(0.2 - 0.1)


def test_as_many_songs_are_planned_as_mps_gains_from() -> None:
    """With an H20's renderer, more than twelve would not pay otherwise."""
    model = benchmarks.find_gpu("H20")
    assert model is not None
    workload = Workload(duration_s=240, guided=True)
    less, more = (
        capacity(
            GpuSpec(name="H20", vram_gb=size, speed=model.speed), load_of(size, (DIT_2B,), None, workload), workload
        )
        for size in (28, 34)
    )
    assert less.lm_room < benchmarks.MPS_GAINS_FROM
    assert less.bound_by == "memory"
    assert more.lm_songs >= benchmarks.MPS_GAINS_FROM
    assert (more.songs_a_minute or 0) > (less.songs_a_minute or 0) * 1.1


@pytest.mark.parametrize(("vram_gb", "measured"), [(8, 203), (12, 206), (16, 72), (24, 80)])
def test_songs_a_minute_of_small_cards_are_those_measured(vram_gb: int, measured: int) -> None:
    """On an H200 that used so much memory: songs of 240 s, without the LM below 16 GB, with the 1.7B above."""
    gpu = GpuSpec(name="H200", vram_gb=vram_gb)
    workload = Workload(duration_s=240, audio_format="flac", thinking=vram_gb >= OFFLOAD_BELOW_GB)
    load = load_of(vram_gb, (DIT_2B,), None, workload)
    if not workload.thinking:
        load = replace(load, lm=None)
    assert capacity(gpu, load, workload).songs_a_minute == pytest.approx(measured, rel=0.12)


def test_offloading_leaves_one_part_on_the_card() -> None:
    whole, half, bare = (
        ModelSet(models=(DIT_2B, DIT_XL), offload_models=models, offload_dit=dit)
        for models, dit in ((False, False), (True, False), (True, True))
    )
    assert bare.weights == DIT_XL.weights
    assert half.weights == DIT_XL.weights + DIT_2B.weights + 2 * max(benchmarks.OWN_PARTS)
    assert bare.weights < half.weights < whole.weights


def test_two_models_share_the_text_encoder_and_the_vae() -> None:
    one, other, both = (ModelSet(models=models).weights for models in ((DIT_2B,), (DIT_XL,), (DIT_2B, DIT_XL)))
    shared = 2 * sum(benchmarks.SHARED_PARTS) + benchmarks.LOADED_BEYOND_PARAMETERS
    assert both == one + other - shared


def test_the_language_model_falls_to_transformers_where_vllm_has_no_room_for_a_song() -> None:
    tight, roomy = (plan_lm(LmRequest(init=True, model=LMS[0]), BUILT_IN.tier_of(size), size) for size in (12, 80))
    assert tight is not None
    assert roomy is not None
    assert tight.on_gpu(Workload(), 12, 1).backend == "pt"
    assert roomy.on_gpu(Workload(), 80, 1).backend == "vllm"
    assert replace(tight, backend="vllm").on_gpu(Workload(), 12, 1).room(Workload()) == 0


def test_without_a_gpu_nothing_is_promised() -> None:
    found = capacity(GpuSpec(name="CPU", vram_gb=0), ModelSet(), Workload(thinking=False))
    assert (found.workers, found.songs_a_minute, found.bound_by, found.split) == (LEAST_WORKERS, None, None, None)


def test_a_language_model_that_takes_the_renderers_place_does_not_fit() -> None:
    largest = "acestep-5Hz-lm-4B"
    assert not on(16, Workload(), ((DIT_2B,), largest)).fits
    assert left_over(GpuSpec(name="", vram_gb=16), load_of(16, (DIT_2B,), largest, Workload())) < 0
    assert on(16, Workload()).fits  # left to itself, the worker takes a smaller one


@pytest.mark.parametrize("size", DIT_SIZES)
@given(SIZES)
def test_the_shares_are_the_card(size: benchmarks.DitSize, vram_gb: float) -> None:
    card, load = GpuSpec(name="", vram_gb=vram_gb), load_of(vram_gb, (size,), None, Workload())
    split = split_of(card, load, Workload())
    if split.renderer:
        assert split.reserve + split.lm + split.renderer == split.gpu
    else:
        assert split.reserve + split.lm >= split.gpu
