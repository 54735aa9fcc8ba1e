# SPDX-License-Identifier: Apache-2.0
"""The renderer against plain diffusers: the same arguments and the same seed make the same song.

The plain side loads the checkpoint itself and is called by hand, argument by argument, so that the translation of a
request is part of what is compared.
"""

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

from acestep_consumer.audio.codec import decode, encode
from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.errors import Cancelled, InputUnreadable, InvalidRequest, RenderFailed
from acestep_consumer.domain.job import Job, Plan, Rendering, Sources
from acestep_consumer.engine.messages import Render, TokenizeAudio
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.batch_request import AudioCopy
from acestep_consumer.engine.renderer.device import Offload
from acestep_consumer.engine.renderer.encode_songs import SongEncoder
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import AlignedLyrics
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.renderer.render import render, tokenize_audio
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.testing.tiny_checkpoint import write
from acestep_consumer.policy.scoring import KNOWN, BestSongs
from acestep_schemas.events import LimitsReport, Metas, ModelChoice, PolicyReport
from acestep_schemas.request import GenerationRequest

RATE = 48_000
TURBO, BASE = "acestep-v15-turbo", "acestep-v15-base"
# Songs below 128 frames are made on 128: there is no plain diffusers to compare them with.
CODES = format_codes(61 * index for index in range(30))

Samples = NDArray[np.float32]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def resources(checkpoints: Path) -> RenderResources:
    """Both models."""
    settings = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cpu", pack_wait_ms=0)
    return RenderResources(startup.open_runtime(settings).scheduler)


@pytest.fixture(scope="module")
def plain(checkpoints: Path) -> dict[str, Any]:
    """Both models as any user of diffusers would load them."""
    with quietly():
        loaded = {name: AceStepPipeline.from_pretrained(checkpoints / name) for name in (TURBO, BASE)}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of a chord over noise, in float32, so that no encoder stands between the two sides."""
    return recording(tmp_path_factory.mktemp("source") / "source", seconds=6, hz=220)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("reference") / "reference", seconds=1, hz=550)


def recording(stem: Path, *, seconds: float, hz: float) -> Path:
    times = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(round(hz)).normal(0, 0.05, (2, len(times)))
    chord = np.stack((np.sin(2 * np.pi * hz * times), np.sin(3 * np.pi * hz * times))) / 3
    return encode((chord + noise).astype(np.float32), stem, "wav32", RATE).path


def tensor(path: Path) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0].T.copy())


def render_message(
    folder: Path,
    *,
    seeds: Sequence[int] = (7,),
    sources: Sources | None = None,
    plan: Plan | None = None,
    **request: Any,
) -> Render:
    fields = {"prompt": "slow jazz", "lyrics": "[verse]\nla la", "audio_format": "wav32", "use_tiled_decode": False}
    # DCW is on for turbo, and plain diffusers has none.
    asked = GenerationRequest.model_validate({**fields, "dcw_enabled": False, **request})
    return Render(
        request_id=1,
        job=Job(
            task_id="job",
            request=asked,
            model=ModelChoice(requested=None, used=asked.model or TURBO, fallback=False),
            lm=None,
            policy=PolicyReport(
                tier="unlimited",
                vram_gb=0,
                lm_loaded=False,
                table_version="1",
                limits=LimitsReport(max_duration_s=600, max_batch_size=8),
            ),
            seeds=tuple(seeds),
        ),
        plan=plan or Plan(metas=Metas()),
        sources=sources or Sources(),
        folder=folder,
    )


def made_by(resources: RenderResources, message: Render) -> list[Samples]:
    message.folder.mkdir(exist_ok=True)
    return [samples_of(track.path) for track in rendered(resources, message).tracks]


def rendered(resources: RenderResources, message: Render) -> Rendering:
    return render(resources, message, lambda *_: None, lambda: False)


def samples_of(path: Path) -> Samples:
    return decode(path, sample_rate=RATE, max_seconds=60)


def same(ours: Samples, theirs: Samples) -> bool:
    """Equal up to the rounding of float32: a batch adds up in another order."""
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < 1e-5)


def made_plainly(pipeline: Any, seed: int, **arguments: Any) -> Samples:
    """One song by plain diffusers, everything drawn from ``seed``."""
    torch.manual_seed(seed)
    given = {"prompt": "slow jazz", "lyrics": "[verse]\nla la", "generator": torch.Generator().manual_seed(seed)}
    song: Samples = pipeline(**{**given, **arguments}, output_type="np").audios[0]
    return song


@contextmanager
def sampling(pipeline: Any, generator: torch.Generator | None) -> Iterator[None]:
    """Give a plain pipeline the SDE sampler, with noise from ``generator`` or from torch's global one."""
    usual = pipeline.scheduler
    stochastic = FlowMatchEulerDiscreteScheduler.from_config(usual.config, stochastic_sampling=True)
    stochastic.step = functools.partial(stochastic.step, generator=generator)
    pipeline.scheduler = stochastic
    yield
    pipeline.scheduler = usual


TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name -> (fields of the request, arguments of the pipeline)
    "text2music": (
        {
            "audio_duration": 6.4,
            "bpm": 96,
            "key_scale": "A minor",
            "time_signature": "3",
            "vocal_language": "de",
            "inference_steps": 5,
            "shift": 2.0,
            "instruction": "Hum it:",
        },
        {
            "audio_duration": 6.4,
            "bpm": 96,
            "keyscale": "A minor",
            "timesignature": "3",
            "vocal_language": "de",
            "num_inference_steps": 5,
            "shift": 2.0,
            "instruction": "Hum it:",
        },
    ),
    "timesteps": (
        {"audio_duration": 6, "timesteps": "0.97,0.76,0.5,0.28,0"},
        {"audio_duration": 6, "timesteps": [0.97, 0.76, 0.5, 0.28]},
    ),
    "codes": ({"audio_code_string": CODES}, {"audio_codes": CODES, "audio_duration": None}),
    "instrumental": ({"audio_duration": 6, "lyrics": "[inst]"}, {"audio_duration": 6, "lyrics": "[inst]"}),
    "no lyrics": ({"audio_duration": 6, "lyrics": ""}, {"audio_duration": 6, "lyrics": ""}),
}
# Plain diffusers shows the model the part to make, and keeps nothing around it.
AS_DIFFUSERS = {"chunk_mask_mode": "explicit", "repaint_mode": "aggressive"}
FROM_SOURCE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cover": ({"task_type": "cover"}, {"task_type": "cover"}),
    "repaint": (
        {"task_type": "repaint", "repainting_start": 1.5, "repainting_end": 3.2, **AS_DIFFUSERS},
        {"task_type": "repaint", "repainting_start": 1.5, "repainting_end": 3.2},
    ),
    "repaint to the end": (
        {"task_type": "repaint", "repainting_start": 1.5, "repainting_end": -1, **AS_DIFFUSERS},
        {"task_type": "repaint", "repainting_start": 1.5},
    ),
    "extract": (
        {"task_type": "extract", "track_name": "vocals"},
        {"task_type": "extract", "track_name": "vocals"},
    ),
    "lego": (
        {"task_type": "lego", "track_name": "drums", "repainting_start": 1, **AS_DIFFUSERS},
        {"task_type": "lego", "track_name": "drums", "repainting_start": 1.0},
    ),
    "complete": (
        {"task_type": "complete", "track_classes": "drums,bass"},
        {"task_type": "complete", "complete_track_classes": ["drums", "bass"]},
    ),
}


@pytest.mark.parametrize("model", [TURBO, BASE])
@pytest.mark.parametrize("case", TASKS)
def test_a_song_equals_plain_diffusers(
    case: str, model: str, resources: RenderResources, plain: dict[str, Any], tmp_path: Path
) -> None:
    fields, arguments = TASKS[case]
    (ours,) = made_by(resources, render_message(tmp_path, model=model, **fields))
    assert same(ours, made_plainly(plain[model], 7, **arguments))


# Turbo was not trained for the other tasks, and policy refuses them there.
BY_MODEL = [(BASE, name) for name in FROM_SOURCE] + [
    (TURBO, name) for name in FROM_SOURCE if name.startswith(("cover", "repaint"))
]


@pytest.mark.parametrize("case", BY_MODEL, ids=" ".join)
def test_a_song_from_source_audio_equals_plain_diffusers(
    case: tuple[str, str], resources: RenderResources, plain: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    model, name = case
    fields, arguments = FROM_SOURCE[name]
    (ours,) = made_by(resources, render_message(tmp_path, model=model, sources=Sources(source=source), **fields))
    theirs = made_plainly(plain[model], 7, src_audio=tensor(source), audio_duration=None, **arguments)
    assert same(ours, theirs)


def test_reference_and_source_audio_together_equal_plain_diffusers(
    resources: RenderResources, plain: dict[str, Any], source: Path, reference: Path, tmp_path: Path
) -> None:
    sources = Sources(source=source, reference=reference)
    (ours,) = made_by(resources, render_message(tmp_path, task_type="cover", sources=sources))
    arguments = {"src_audio": tensor(source), "reference_audio": tensor(reference), "audio_duration": None}
    assert same(ours, made_plainly(plain[TURBO], 7, task_type="cover", **arguments))


def test_guidance_and_its_interval_equal_plain_diffusers(
    resources: RenderResources, plain: dict[str, Any], tmp_path: Path
) -> None:
    """The interval is one of flow times, 1 to 0, as in ACE-Step; diffusers counts from the other end."""
    fields: dict[str, Any] = {"audio_duration": 6, "guidance_scale": 4.5}
    ours_only: dict[str, Any] = {"cfg_interval_start": 0.4, "cfg_interval_end": 0.8}
    fields_of_theirs = {**fields, "cfg_interval_start": 0.2, "cfg_interval_end": 0.6}
    (ours,) = made_by(resources, render_message(tmp_path, model=BASE, **fields, **ours_only))
    assert same(ours, made_plainly(plain[BASE], 7, **fields_of_theirs))
    assert not same(ours, made_plainly(plain[BASE], 7, **{**fields_of_theirs, "guidance_scale": 1.0}))


@pytest.mark.parametrize("model", [TURBO, BASE])
def test_sde_equals_plain_diffusers_after_the_same_seed(
    model: str, resources: RenderResources, plain: dict[str, Any], tmp_path: Path
) -> None:
    """Without inputs all noise is one stream: the plain pipeline needs no generator at all."""
    (ours,) = made_by(resources, render_message(tmp_path, model=model, audio_duration=6, infer_method="sde"))
    with sampling(plain[model], None):
        assert same(ours, made_plainly(plain[model], 7, audio_duration=6, generator=None))


def test_sde_with_source_audio_equals_plain_diffusers_with_the_songs_generator(
    resources: RenderResources, plain: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    message = render_message(tmp_path, task_type="cover", infer_method="sde", sources=Sources(source=source))
    (ours,) = made_by(resources, message)
    noise = torch.Generator().manual_seed(7)
    arguments = {"task_type": "cover", "src_audio": tensor(source), "audio_duration": None, "generator": noise}
    with sampling(plain[TURBO], noise):
        assert same(ours, made_plainly(plain[TURBO], 7, **arguments))


@pytest.mark.parametrize("tiled", [True, False])
def test_a_song_of_many_tiles_equals_plain_diffusers_without_tiles(
    *, tiled: bool, resources: RenderResources, plain: dict[str, Any], tmp_path: Path
) -> None:
    """Tiles are always used and make no difference, whatever ``use_tiled_decode`` says."""
    (ours,) = made_by(resources, render_message(tmp_path, audio_duration=37, inference_steps=1, use_tiled_decode=tiled))
    assert same(ours, made_plainly(plain[TURBO], 7, audio_duration=37, num_inference_steps=1))


@pytest.mark.parametrize("method", ["ode", "sde"])
@pytest.mark.parametrize("task", ["text2music", "cover"])
def test_a_song_in_a_batch_equals_the_song_alone(
    task: str, method: str, resources: RenderResources, source: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"task_type": task, "infer_method": method, "sources": Sources(source=source)}
    if task == "text2music":
        fields |= {"audio_duration": 1}
    together = made_by(resources, render_message(tmp_path / "both", seeds=(7, 8), **fields))
    for seed, song in zip((7, 8), together, strict=True):
        (alone,) = made_by(resources, render_message(tmp_path / str(seed), seeds=(seed,), **fields))
        assert np.allclose(song, alone, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_a_batch_equals_a_plain_batch(resources: RenderResources, plain: dict[str, Any], tmp_path: Path) -> None:
    """Songs with audio codes of their own, as the planner makes them."""
    codes = (CODES, CODES.replace("_6", "_7"))
    planned = Plan(metas=Metas(), audio_codes=codes)
    ours = made_by(resources, render_message(tmp_path, model=BASE, seeds=(7, 8), plan=planned))
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    theirs = plain[BASE](
        prompt=["slow jazz"] * 2,
        lyrics=["[verse]\nla la"] * 2,
        audio_codes=list(codes),
        audio_duration=None,
        generator=generators,
        output_type="np",
    ).audios
    assert np.allclose(np.stack(ours), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [(0.04, 1), (0.26, 7), (3, 75), (8.2, 204), (9.2, 229), (10.04, 250), (10.95, 272)],
)
def test_a_song_has_as_many_frames_as_the_original_counts(
    seconds: float, frames: int, resources: RenderResources, tmp_path: Path
) -> None:
    """Tenths of a second, then whole samples, then whole frames; a song of less than 128 is cut to its length."""
    (ours,) = made_by(resources, render_message(tmp_path, audio_duration=seconds, inference_steps=1))
    assert ours.shape == (2, frames * 1_920)


def test_a_short_song_equals_the_start_of_one_of_128_frames(
    resources: RenderResources, plain: dict[str, Any], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"audio_duration": 3, "enable_normalization": False}
    (ours,) = made_by(resources, render_message(tmp_path, inference_steps=2, **fields))
    with pytest.MonkeyPatch.context() as patch:
        # The text says three seconds all the same.
        patch.setattr(plain[TURBO], "_build_metadata_string", _naming(plain[TURBO], 3.0))
        whole = made_plainly(plain[TURBO], 7, audio_duration=128 / 25, num_inference_steps=2)
    kept = whole[:, : ours.shape[1]]
    assert same(ours / np.abs(ours).max(), kept / np.abs(kept).max())


def _naming(pipeline: Any, seconds: float) -> Callable[..., str]:
    build = pipeline._build_metadata_string

    def built(**named: Any) -> str:
        text: str = build(**{**named, "audio_duration": seconds})
        return text

    return built


@pytest.mark.parametrize("dit", [True, False])
def test_an_offloaded_song_equals_one_with_everything_loaded(
    *,
    dit: bool,
    checkpoints: Path,
    resources: RenderResources,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is the CPU here: modules are registered and loaded, but not moved."""
    monkeypatch.setattr(startup, "offload_for", lambda *_: Offload(models=True, dit=dit))
    settings = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cpu", pack_wait_ms=0)
    scheduler = startup.open_runtime(settings).scheduler
    offloading = RenderResources(scheduler)
    for model, fields in (
        (BASE, {"task_type": "cover", "audio_cover_strength": 0.5, "inference_steps": 3}),
        (TURBO, TASKS["codes"][0]),
    ):
        message = render_message(tmp_path, model=model, sources=Sources(source=source), **fields)
        assert all(map(same, made_by(offloading, message), made_by(resources, message)))
        with pytest.raises(Cancelled):
            render(offloading, message, lambda *_: None, _after(4))
    for _ in range(2):  # before the second call the device's thread has found that it is idle
        scheduler.run_on_device(lambda: None)
    (swapper,) = {runner.parts.swapper for runner in scheduler._runners.values()}
    assert swapper is not None
    assert swapper._loaded is None


def _after(calls: int) -> Callable[[], bool]:
    """Say no that often, then yes."""
    answers = itertools.chain(itertools.repeat(object=False, times=calls), itertools.repeat(object=True))
    return lambda: next(answers)


def test_progress_rises_to_the_end_of_each_stage(resources: RenderResources, tmp_path: Path) -> None:
    """Two songs: each is encoded as soon as it is there, so that the stages meet; within a stage it only rises."""
    progress: dict[str, list[float]] = {"render": [], "encode": []}
    message = render_message(tmp_path, audio_duration=1, inference_steps=4, seeds=(1, 2))
    render(resources, message, lambda fraction, stage: progress[stage].append(round(fraction, 3)), lambda: False)
    assert progress == {"render": [0.225, 0.45, 0.675, 0.9, 1.0], "encode": [0.0, 0.5, 1.0]}


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_cancelled_song_stops_at_the_next_step_and_leaves_no_trace(
    steps_before: int, resources: RenderResources, tmp_path: Path
) -> None:
    progress: list[float] = []
    message = render_message(tmp_path, audio_duration=1, infer_method="sde")
    (before,) = made_by(resources, message)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(Cancelled):
        render(resources, message, lambda fraction, _: progress.append(fraction), lambda: len(progress) >= steps_before)
    assert len(progress) == steps_before
    assert list(tmp_path.iterdir()) == []
    (after,) = made_by(resources, message)
    assert same(before, after)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_out_of_the_renderer(name: str, resources: RenderResources, tmp_path: Path) -> None:
    made = rendered(resources, render_message(tmp_path, audio_duration=1.2, audio_format=name, seeds=(3, 4)))
    assert [track.path.name for track in made.tracks] == [f"{index}{FORMATS[name].suffix}" for index in range(2)]
    assert [track.seed for track in made.tracks] == [3, 4]
    for track in made.tracks:
        assert (track.format, track.content_type) == (name, FORMATS[name].content_type)
        assert (track.sample_rate, track.channels) == (RATE, 2)
        assert track.duration_s == pytest.approx(1.2)
        assert samples_of(track.path).shape[1] / RATE == pytest.approx(1.2, abs=0.06)
    assert made.render_s > 0
    assert made.encode_s > 0


@pytest.mark.parametrize(("bits", "rate"), [("128k", 44_100), ("320k", 48_000)])
def test_an_mp3_has_the_bit_rate_and_the_sample_rate_that_are_asked_for(
    bits: str, rate: int, resources: RenderResources, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"audio_format": "mp3", "mp3_bitrate": bits, "mp3_sample_rate": rate}
    (track,) = rendered(resources, render_message(tmp_path, audio_duration=2, inference_steps=1, **fields)).tracks
    assert (track.sample_rate, track.duration_s) == (rate, 2)
    with av.open(str(track.path)) as file:
        (stream,) = file.streams.audio
        assert (stream.rate, stream.bit_rate) == (rate, int(bits[:-1]) * 1_000)
        seconds = sum(frame.samples for frame in file.decode(stream)) / rate
    assert seconds == pytest.approx(2, abs=0.06)


def test_a_song_fades_in_and_out(resources: RenderResources, tmp_path: Path) -> None:
    def song(**fields: Any) -> Samples:
        (made,) = made_by(resources, render_message(tmp_path, audio_duration=6, inference_steps=1, **fields))
        return made

    plain, faded = song(), song(fade_in_duration=1, fade_out_duration=2)
    assert np.array_equal(faded[:, RATE : 4 * RATE], plain[:, RATE : 4 * RATE])
    for index, factor in ((0, 0), (RATE // 2, 0.5), (5 * RATE, 0.5), (6 * RATE - 1, 0)):
        np.testing.assert_allclose(faded[:, index], factor * plain[:, index], atol=1e-4)


def test_without_any_duration_a_song_has_two_minutes(resources: RenderResources, tmp_path: Path) -> None:
    (track,) = rendered(resources, render_message(tmp_path, inference_steps=1, use_tiled_decode=True)).tracks
    assert track.duration_s == 120


def test_a_compressed_source_at_another_rate_is_covered(
    resources: RenderResources, source: Path, tmp_path: Path
) -> None:
    samples = samples_of(source)[:, ::2]
    file = encode(np.ascontiguousarray(samples), tmp_path / "source", "mp3", RATE // 2).path
    message = render_message(tmp_path, task_type="cover", inference_steps=1, sources=Sources(source=file))
    (track,) = rendered(resources, message).tracks
    assert track.duration_s == pytest.approx(6, abs=0.1)


def test_warnings_name_what_was_not_done(resources: RenderResources, tmp_path: Path) -> None:
    message = render_message(
        tmp_path, audio_duration=1, inference_steps=1, use_adg=True, guidance_scale=3, prompt="long " * 99
    )
    made = rendered(resources, message)
    assert [text.split(" ")[0] for text in made.warnings] == ["use_adg", "guidance_scale", "prompt"]
    assert "the model reads 256" in made.warnings[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "the source audio is missing"), (b"no sound", "the source audio cannot be read as audio")],
)
def test_a_bad_input_is_named_and_the_renderer_goes_on(
    content: bytes | None, said: str, resources: RenderResources, tmp_path: Path
) -> None:
    file = tmp_path / "input"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputUnreadable, match=said):
        rendered(resources, render_message(tmp_path, task_type="cover", sources=Sources(source=file)))
    assert rendered(resources, render_message(tmp_path, audio_duration=1)).tracks


def test_an_input_over_the_time_limit_is_refused(resources: RenderResources, source: Path, tmp_path: Path) -> None:
    message = render_message(tmp_path, task_type="cover", sources=Sources(source=source))
    with pytest.raises(InputUnreadable, match=r"longer than 1\.5 seconds"):
        render(replace(resources, max_input_s=1.5), message, lambda *_: None, lambda: False)


def test_tokenizing_audio_gives_the_codes_that_a_cover_of_it_is_made_from(
    resources: RenderResources, source: Path, tmp_path: Path
) -> None:
    from_audio = render_message(
        tmp_path, task_type="cover", sources=Sources(source=source), src_audio_path="s3://b/a.wav"
    )
    progress = tokenize_audio(
        resources, TokenizeAudio(request_id=1, job=from_audio.job, sources=from_audio.sources), lambda: False
    )
    assert progress.source_s == 6
    assert progress.codes.count("<|audio_code_") == 30
    from_codes = render_message(tmp_path, task_type="cover", audio_code_string=progress.codes)
    (covered,), (again,) = (made_by(resources, message) for message in (from_audio, from_codes))
    np.testing.assert_allclose(covered, again, atol=1e-4)


def test_tokenizing_without_source_audio_says_what_is_missing(resources: RenderResources, tmp_path: Path) -> None:
    job = render_message(tmp_path, full_analysis_only=True).job
    with pytest.raises(InvalidRequest, match="src_audio_path"):
        tokenize_audio(resources, TokenizeAudio(request_id=1, job=job, sources=Sources()), lambda: False)


def test_the_best_candidate_is_encoded_and_all_are_reported(resources: RenderResources, tmp_path: Path) -> None:
    every = made_by(resources, render_message(tmp_path / "all", seeds=(7, 8, 9), audio_duration=2))

    best = rendered(resources, render_message(tmp_path, seeds=(7, 8, 9), audio_duration=2, candidates=3, keep=2))

    ranked = sorted(range(3), key=lambda place: -(best.candidates[place].score or 0))
    assert [each.index for each in best.candidates] == [
        ranked.index(place) if place in ranked[:2] else None for place in range(3)
    ]
    assert [each.seed for each in best.candidates] == [7, 8, 9]
    assert best.kept == tuple(ranked[:2])
    assert [track.path.name for track in best.tracks] == ["0.wav", "1.wav"]
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["0.wav", "1.wav"]
    for track, place in zip(best.tracks, best.kept, strict=True):
        assert track.seed == best.candidates[place].seed
        assert same(samples_of(track.path), every[place])
    assert best.score_table == "acestep-consumer-1"
    assert all(set(each.measures) == KNOWN for each in best.candidates)


def test_candidates_of_an_instrumental_song_are_not_measured_by_their_lyrics(
    resources: RenderResources, tmp_path: Path
) -> None:
    message = render_message(tmp_path, seeds=(7, 8), audio_duration=1, candidates=2, lyrics="[Instrumental]")
    made = rendered(resources, message)
    assert all(set(each.measures) == KNOWN - {"lyrics"} for each in made.candidates)
    assert [track.lyric_score for track in made.tracks] == [None]


def test_the_candidate_that_sings_its_lyrics_is_kept(
    resources: RenderResources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = iter((0.1, 0.5, 0.2))
    monkeypatch.setattr(SongEncoder, "_aligned", lambda *_: AlignedLyrics((), next(found)))
    message = render_message(tmp_path, seeds=(7, 8, 9), audio_duration=1, candidates=3)
    made = rendered(resources, message)
    assert [each.measures["lyrics"] for each in made.candidates] == [0.1, 0.5, 0.2]
    assert [(track.seed, track.lyric_score, track.side_files) for track in made.tracks] == [(8, 0.5, ())]


class TestUndecodedCandidates:
    """Candidates whose samples are not numbers, as a model makes them that has been driven too far."""

    @pytest.fixture
    def spoil(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
        """Replace the samples of the songs with these places by not-a-numbers."""

        def spoil(places: set[int]) -> None:
            number, wait = itertools.count(), AudioCopy.wait

            def spoiled(self: AudioCopy) -> torch.Tensor:
                audio = wait(self)
                if audio.ndim == 2 and next(number) in places:
                    return torch.full_like(audio, torch.nan)
                return audio

            monkeypatch.setattr(AudioCopy, "wait", spoiled)

        return spoil

    def message(self, folder: Path) -> Render:
        # Without lyrics, so that no other copy is waited for.
        return render_message(folder, seeds=(7, 8, 9), audio_duration=1, candidates=3, keep=2, lyrics="")

    def test_one_ranks_last_and_fails_no_job(
        self, resources: RenderResources, spoil: Callable[[set[int]], None], tmp_path: Path
    ) -> None:
        spoil({0})
        made = rendered(resources, self.message(tmp_path))
        assert sorted(track.seed for track in made.tracks) == [8, 9]
        assert (made.candidates[0].score, made.candidates[0].kept, made.candidates[0].measures) == (None, False, {})

    def test_two_leave_fewer_than_asked_for_and_a_warning(
        self, resources: RenderResources, spoil: Callable[[set[int]], None], tmp_path: Path
    ) -> None:
        spoil({0, 2})
        made = rendered(resources, self.message(tmp_path))
        assert [track.seed for track in made.tracks] == [8]
        assert "keep = 2: 1 kept, the other candidates could not be decoded" in made.warnings

    def test_all_fail_the_job(
        self, resources: RenderResources, spoil: Callable[[set[int]], None], tmp_path: Path
    ) -> None:
        spoil({0, 1, 2})
        with pytest.raises(RenderFailed, match="samples that are not finite numbers"):
            rendered(resources, self.message(tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_no_more_candidates_are_in_memory_than_are_kept(
    resources: RenderResources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    seen, add, wait = [], BestSongs.add, AudioCopy.wait

    def counted_wait(self: AudioCopy) -> torch.Tensor:
        audio = wait(self)
        alive.add(audio)
        return audio

    def counted_add(self: BestSongs[Any], *arguments: Any) -> None:
        add(self, *arguments)
        gc.collect()
        seen.append(len(alive))

    monkeypatch.setattr(AudioCopy, "wait", counted_wait)
    monkeypatch.setattr(BestSongs, "add", counted_add)
    rendered(resources, render_message(tmp_path, seeds=range(6), audio_duration=1, candidates=6, keep=2, lyrics=""))
    # The one that was added last is still in the caller's hands.
    assert len(seen) == 6
    assert max(seen) <= 3
