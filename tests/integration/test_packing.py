# SPDX-License-Identifier: Apache-2.0
"""Songs in a batch against the same songs alone: latents and audio are equal up to rounding, whatever the others."""

import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from acestep_consumer.domain.job import Plan, Sources
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer import lora
from acestep_consumer.engine.renderer.batch_request import RequestCallbacks
from acestep_consumer.engine.renderer.code_latents import CodeLatents
from acestep_consumer.engine.renderer.denoising.cuda_graphs import StepGraphs
from acestep_consumer.engine.renderer.lora import Lora
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from acestep_consumer.policy.memory_budget import MemoryBudget, StepGraphLimits
from acestep_schemas.events import Metas
from tests.support.loras import write_lora
from tests.support.scheduler_harness import (
    CODES,
    Result,
    SchedulerHarness,
    assert_same,
    open_runners,
    record_device,
    recording,
    render_message,
)


@pytest.fixture(scope="module")
def runners(tiny_checkpoints: Path) -> dict[str, ModelRunner]:
    return open_runners(tiny_checkpoints)


@pytest.fixture
def harness(runners: dict[str, ModelRunner], monkeypatch: pytest.MonkeyPatch) -> SchedulerHarness:
    made = SchedulerHarness(runners)
    record_device(made, monkeypatch)
    return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sources]:
    """Short sources of odd and even length, one of them with reference audio, and one that is not lengthened."""
    folder = tmp_path_factory.mktemp("inputs")
    source = recording(folder / "source", seconds=0.76, hz=220)
    reference = recording(folder / "reference", seconds=0.8, hz=550)
    other = recording(folder / "other", seconds=0.48, hz=330)
    long = recording(folder / "long", seconds=5.4, hz=440)
    return {
        "none": Sources(),
        "source": Sources(source=source),
        "other": Sources(source=other),
        "long": Sources(source=long),
        "both": Sources(source=source, reference=reference),
        "reference": Sources(reference=reference),
    }


Asked = tuple[str, dict[str, Any]]

REPAINT = {"task_type": "repaint", "repainting_start": 1.3, "repainting_end": 3.1}

EDIT = {"flow_edit_morph": True, "flow_edit_source_caption": "quiet piano", "flow_edit_source_lyrics": "hm"}

# name -> (inputs, fields of the request). Lengths, steps and times differ, so that songs leave at different moments.
EITHER: dict[str, Asked] = {
    "text": ("none", {"audio_duration": 1, "inference_steps": 4}),
    "text, 26 frames": ("none", {"audio_duration": 1.04, "prompt": "a waltz for two", "shift": 1.0}),
    "text, 33 frames": ("none", {"audio_duration": 1.3, "lyrics": "", "shift": 4.5, "inference_steps": 5}),
    "text, sde": ("none", {"audio_duration": 0.9, "infer_method": "sde", "inference_steps": 4}),
    "timesteps": ("none", {"audio_duration": 1.2, "timesteps": "0.97,0.76,0.5,0.28,0"}),
    "reference": ("reference", {"audio_duration": 1.1}),
    "codes": ("none", {"audio_code_string": CODES}),
    "codes, then text": ("none", {"audio_code_string": CODES, "audio_cover_strength": 0.3, "inference_steps": 3}),
    "cover": ("source", {"task_type": "cover", "inference_steps": 3}),
    "cover, sde": ("other", {"task_type": "cover", "infer_method": "sde", "inference_steps": 3}),
    "cover, then text": ("source", {"task_type": "cover", "audio_cover_strength": 0.5}),
    "cover, with reference": ("both", {"task_type": "cover"}),
    "cover without codes": ("long", {"task_type": "cover-nofsq", "inference_steps": 3}),
    "repaint": ("source", {"task_type": "repaint", "repainting_start": 0.2, "repainting_end": 0.6}),
    "repaint, conservative": ("long", {**REPAINT, "repaint_mode": "conservative", "inference_steps": 4}),
    "repaint, aggressive": ("long", {**REPAINT, "repaint_mode": "aggressive", "chunk_mask_mode": "explicit"}),
    "repaint, freer": ("long", {**REPAINT, "repaint_strength": 0.8, "inference_steps": 5}),
    "repaint, sde": ("long", {**REPAINT, "infer_method": "sde", "repaint_latent_crossfade_frames": 3}),
    "repaint, extended": ("long", {**REPAINT, "repainting_start": -0.9, "repainting_end": 6.1, "inference_steps": 3}),
    "repaint, whole": ("long", {"task_type": "repaint", "chunk_mask_mode": "explicit", "inference_steps": 3}),
    "repaint, then text": ("long", {**REPAINT, "audio_cover_strength": 0.5, "inference_steps": 4}),
    "text, heun": ("none", {"audio_duration": 1.5, "sampler_mode": "heun", "inference_steps": 4}),
    "text, limited and smoothed": (
        "none",
        {"audio_duration": 1.1, "velocity_norm_threshold": 0.6, "velocity_ema_factor": 0.2, "inference_steps": 5},
    ),
    "text, no dcw": ("none", {"audio_duration": 1.2, "dcw_enabled": False, "inference_steps": 3}),
    "text, dcw of long filters": (
        "none",
        {"audio_duration": 5.24, "dcw_enabled": True, "dcw_wavelet": "db4", "dcw_high_scaler": 0.3},
    ),
    "text, dcw of latents": ("none", {"dcw_enabled": True, "dcw_mode": "pix", "dcw_scaler": 0.1, "audio_duration": 2}),
    "text, retaken": ("none", {"retake_seed": 5, "retake_variance": 0.4, "infer_method": "sde", "audio_duration": 1}),
    "text, rescaled": ("none", {"latent_rescale": 0.8, "latent_shift": 0.1, "audio_duration": 1.4}),
    "text, noise of the device": ("none", {"noise": "device", "audio_duration": 1.6, "infer_method": "sde"}),
    "cover from its source": ("source", {"task_type": "cover", "cover_noise_strength": 0.4, "inference_steps": 6}),
    "codes from their latents, then text": (
        "none",
        {"audio_code_string": CODES, "cover_noise_strength": 0.3, "audio_cover_strength": 0.5, "inference_steps": 6},
    ),
    "flow edit": ("long", {**EDIT, "flow_edit_n_max": 0.6, "inference_steps": 5}),
    "flow edit, averaged": ("source", {**EDIT, "task_type": "cover", "flow_edit_n_min": 0.3, "flow_edit_n_avg": 2}),
    "heun, smoothed, dcw, then text": (
        "other",
        {
            "task_type": "cover",
            "audio_cover_strength": 0.6,
            "sampler_mode": "heun",
            "velocity_norm_threshold": 0.9,
            "dcw_enabled": True,
            "inference_steps": 4,
        },
    ),
    "at another level": ("none", {"audio_duration": 1, "normalization_db": -12, "inference_steps": 3}),
    "at its own level": ("none", {"audio_duration": 5.6, "enable_normalization": False}),
}
ONLY_BASE: dict[str, Asked] = {
    "extract": ("source", {"task_type": "extract", "track_name": "vocals"}),
    "lego": ("source", {"task_type": "lego", "track_name": "drums", "repainting_start": 0.5}),
    "lego, kept around its window": (
        "long",
        {"task_type": "lego", "track_name": "bass", "repainting_start": 2, "repainting_end": 4, "guidance_scale": 5.0},
    ),
    "repaint, guided": ("long", {**REPAINT, "guidance_scale": 3.0, "inference_steps": 5}),
    "complete": ("other", {"task_type": "complete", "track_classes": "drums,bass"}),
    "no guidance": ("none", {"guidance_scale": 1.0}),
    "guidance in an interval": (
        "none",
        {"guidance_scale": 4.5, "cfg_interval_start": 0.2, "cfg_interval_end": 0.6, "inference_steps": 6},
    ),
    "guidance, heun": ("none", {"audio_duration": 1.7, "sampler_mode": "heun", "inference_steps": 3}),
    "guidance by angles": ("none", {"use_adg": True, "guidance_scale": 4.0, "audio_duration": 1.8}),
    "guidance by angles, heun": (
        "none",
        {
            "use_adg": True,
            "sampler_mode": "heun",
            "cfg_interval_start": 0.3,
            "audio_duration": 1.9,
            "inference_steps": 4,
        },
    ),
    "flow edit, guided and smoothed": (
        "long",
        {
            **EDIT,
            "velocity_norm_threshold": 0.9,
            "velocity_ema_factor": 0.2,
            "flow_edit_n_max": 0.7,
            "inference_steps": 4,
        },
    ),
    "guidance, sde": ("none", {"audio_duration": 1.3, "guidance_scale": 9.0, "infer_method": "sde"}),
    "cover, guided, then text": (
        "source",
        {"task_type": "cover", "guidance_scale": 3.0, "audio_cover_strength": 0.4, "cfg_interval_end": 0.5},
    ),
}


def render_messages(
    table: Mapping[str, Asked], model: str, inputs: Mapping[str, Sources], folder: Path
) -> dict[str, Render]:
    """Give each job a seed of its own: nothing that is mixed up can look right."""
    return {
        name: render_message(folder, model=model, seeds=(index,), sources=inputs[which], **fields)
        for index, (name, (which, fields)) in enumerate(table.items())
    }


@pytest.mark.parametrize(("model", "table"), [(TURBO, EITHER), (BASE, EITHER | ONLY_BASE)], ids=["turbo", "base"])
def test_a_song_of_any_task_in_a_batch_of_all_tasks_equals_the_song_alone(
    model: str, table: dict[str, Asked], harness: SchedulerHarness, inputs: dict[str, Sources], tmp_path: Path
) -> None:
    messages = render_messages(table, model, inputs, tmp_path)
    packed = dict(zip(messages, harness.together(list(messages.values())), strict=True))
    assert len(harness.batches[0].samples) == len(table)
    assert len({len(batch.samples) for batch in harness.batches}) > 2  # they left at different steps
    harness.batches.clear()
    for name, message in messages.items():
        assert_same(packed[name], harness.alone(message))
    assert harness.largest == 1
    assert_all_differ(list(packed.values()))


def assert_all_differ(results: list[Result]) -> None:
    """Songs that all came out the same would prove nothing."""
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            frames = min(len(one.latents[0]), len(other.latents[0]))
            assert not torch.allclose(one.latents[0][:frames], other.latents[0][:frames], atol=1e-2)


@pytest.mark.parametrize("model", [TURBO, BASE])
def test_songs_from_a_moment_to_ten_minutes_share_a_batch(
    model: str, harness: SchedulerHarness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A branch of ten minutes is 7500 tokens, so that a batch can hold one. Decoding it would take a minute."""
    monkeypatch.setattr(ModelRunner, "decode", lambda self, samples, tiles: [torch.zeros(2, 1)] * len(samples))
    longest, scale = (600, 1.0) if model == TURBO else (60, 3.0)
    messages = [
        render_message(
            tmp_path, model=model, audio_duration=seconds, inference_steps=steps, seeds=(index,), guidance_scale=scale
        )
        for index, (seconds, steps) in enumerate([(longest, 1), (10, 2), (0.26, 2), (0.6, 1), (3, 2), (7.4, 2)])
    ]
    packed = harness.together(messages)
    assert len(harness.batches[0].samples) == len(messages)
    assert [len(one.latents[0]) for one in packed] == [25 * longest, 250, 128, 128, 128, 185]
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("model", [TURBO, BASE])
def test_a_song_that_joins_at_anothers_step_costs_neither_anything(
    model: str, method: str, harness: SchedulerHarness, tmp_path: Path
) -> None:
    """The second job arrives after each of the first one's steps; it is over before the first one ends."""
    fields: dict[str, Any] = {"model": model, "infer_method": method, "guidance_scale": 3.0}
    first = render_message(tmp_path, inference_steps=6, seeds=(1,), **fields)
    others = [render_message(tmp_path, audio_duration=0.5 + n / 10, seeds=(10 + n,), **fields) for n in range(3)]
    late, coming = [], iter(others)

    def joined(_done: float) -> None:
        if (message := next(coming, None)) is not None:
            late.append(harness.submit(message))

    early = harness.result(harness.submit(first, RequestCallbacks(progressed=joined)))
    found = [early, *(harness.result(futures) for futures in late)]
    steps = [batch.steps for batch in harness.batches]
    assert steps == [(0,), (1, 0), (2, 1, 0), (3, 1, 0), (4, 1), (5,)]
    for one, message in zip(found, [first, *others], strict=True):
        assert_same(one, harness.alone(message))


@pytest.mark.parametrize("model", [TURBO, BASE])
def test_songs_in_the_memory_of_the_graphs_equal_those_in_packs_of_their_own(
    model: str, runners: dict[str, ModelRunner], harness: SchedulerHarness, inputs: dict[str, Sources], tmp_path: Path
) -> None:
    """Songs leave one after the other: packs of fewer and fewer tokens come to the same memory."""
    tasks = ("codes, then text", "text, 33 frames", "text, sde", "heun, smoothed, dcw, then text", "flow edit")
    messages = list(render_messages({name: EITHER[name] for name in tasks}, model, inputs, tmp_path).values())
    denoiser, replayed = runners[model].denoiser(None), []
    limits = StepGraphLimits.on_a_device_with(vram_gb=16)

    def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        replayed.append(step)
        return step

    with pytest.MonkeyPatch.context() as patched:
        # A graph is for a CUDA device; here the function that it would capture is called.
        patched.setattr(denoiser, "_graphs", StepGraphs(denoiser.dit, limits, capture))
        packed = harness.together(messages)
    assert replayed
    denoiser.reset()
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))


@pytest.mark.parametrize("model", [TURBO, BASE])
def test_jobs_of_several_songs_share_a_batch_song_by_song(
    model: str, harness: SchedulerHarness, inputs: dict[str, Sources], tmp_path: Path
) -> None:
    planned = Plan(metas=Metas(), audio_codes=(CODES, CODES.replace("_6", "_7")))
    messages = [
        render_message(tmp_path, model=model, seeds=(1, 2, 3), infer_method="sde"),
        render_message(tmp_path, model=model, seeds=(2, 1), task_type="cover", sources=inputs["source"]),
        render_message(tmp_path, model=model, seeds=(1, 5), plan=planned),
    ]
    packed = harness.together(messages)
    assert len(harness.batches[0].samples) == 7
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))
    # Text alone is equal in every respect but the seed.
    for index, seed in enumerate((1, 2, 3)):
        only = harness.alone(render_message(tmp_path, model=model, seeds=(seed,), infer_method="sde"))
        assert_same(Result([packed[0].latents[index]], [packed[0].audio[index]], []), only)


def test_songs_with_different_loras_never_share_a_batch(harness: SchedulerHarness, tmp_path: Path) -> None:
    adapted = Sources(loras=(write_lora(tmp_path / "loud.safetensors"),))
    fields: dict[str, Any] = {"lora": {"path": "s3://bucket/loud.safetensors"}}
    messages = [
        render_message(tmp_path, seeds=(1,)),
        render_message(tmp_path, seeds=(2,), sources=adapted, **fields),
        render_message(tmp_path, seeds=(3,)),
        render_message(tmp_path, seeds=(4,), sources=adapted, **fields),
    ]
    packed = harness.together(messages)
    assert [len(batch.samples) for batch in harness.batches] == [2, 2, 2, 2]
    assert_all_differ(packed)
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))


def test_a_lora_makes_room_for_the_next_one_before_that_is_added(
    runners: dict[str, ModelRunner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two at a time may not fit on the device, and each has CUDA graphs of its own."""
    runner = ModelRunner(runners[TURBO].parts)
    path = write_lora(tmp_path / "loud.safetensors")
    one, other = (Lora.at(path, 1.0),), (Lora.at(path, 0.5),)
    before = weakref.ref(runner.denoiser(one).dit.dit)
    left: list[object] = []

    def adapt(*arguments: Any) -> Any:
        gc.collect()
        left.append(before())
        return adapted(*arguments)

    adapted = lora._adapt
    monkeypatch.setattr(lora, "_adapt", adapt)
    runner.denoiser(other)
    assert left == [None]


@pytest.mark.parametrize("tokens", [1, 300])
def test_no_batch_is_larger_than_allowed_unless_it_is_a_single_song(
    tokens: int, runners: dict[str, ModelRunner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A branch of five seconds or less is 64 tokens. A guided song has two, once its interval begins."""
    harness = SchedulerHarness(runners, MemoryBudget(max_tokens=tokens))
    record_device(harness, monkeypatch)
    lengths = (1, 14, 0.4, 7, 1, 1, 3.3)
    fields: dict[str, Any] = {"model": BASE, "inference_steps": 3, "guidance_scale": 3.0, "cfg_interval_end": 0.6}
    messages = [
        render_message(tmp_path, audio_duration=seconds, seeds=(index,), **fields)
        for index, seconds in enumerate(lengths)
    ]
    packed = harness.together(messages)
    assert all(batch.tokens <= tokens or len(batch.samples) == 1 for batch in harness.batches)
    assert any(batch.tokens > tokens for batch in harness.batches)
    assert (harness.largest > 1) == (tokens > 1)
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))


def test_latents_of_codes_that_are_looked_up_are_those_that_the_detokenizer_computes(
    runners: dict[str, ModelRunner],
) -> None:
    """Every tenth code and the last one, in songs of different lengths."""
    every = [*range(0, 64_000, 10), 63_999]
    songs = [every[:3], every[3:1500], every[1500:]]
    for runner in runners.values():
        computed, looked_up = (CodeLatents(runner.parts, tabulated=tabulated) for tabulated in (False, True))
        with torch.inference_mode():
            looked_up.warm_up()
            for one, other, codes in zip(computed.of(songs), looked_up.of(songs), songs, strict=True):
                assert one.shape == (5 * len(codes), runner.parts.dit.dit.config.audio_acoustic_hidden_dim)
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert list(looked_up.of([])) == []
