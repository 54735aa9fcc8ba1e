# SPDX-License-Identifier: Apache-2.0
"""Translation of a job into typed pipeline arguments: values, limits, and warnings."""

import ast
import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.domain.errors import InvalidRequest, LimitExceeded, RenderFailed
from acestep_consumer.domain.job import Job, LoadedModel, Plan
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.renderer.denoising.dcw import Dcw
from acestep_consumer.engine.renderer.denoising.flow_edit import FlowEditRequest
from acestep_consumer.engine.renderer.denoising.sample import SamplerOptions
from acestep_consumer.engine.renderer.output import OutputRules
from acestep_consumer.engine.renderer.pipeline_arguments import (
    DecodedInputs,
    PipelineArguments,
    arguments_for,
    reads_source,
)
from acestep_consumer.engine.renderer.window import KeepRules
from acestep_schemas.events import LimitsReport, Metas, ModelChoice, PolicyReport
from acestep_schemas.request import GenerationRequest

TURBO = LoadedModel("acestep-v15-turbo", Variant.TURBO)
BASE = LoadedModel("acestep-v15-base", Variant.BASE)
SOURCE = DecodedInputs(source=torch.zeros(2, 20 * 48_000))
NOISE = DecodedInputs(source=torch.rand(2, 20 * 48_000) + 0.1)


def job(*, seeds: tuple[int, ...] = (7,), max_duration_s: int = 600, **request: Any) -> Job:
    return Job(
        task_id="job",
        request=GenerationRequest(**request),
        model=ModelChoice(requested=None, used="acestep-v15-turbo", fallback=False),
        lm=None,
        policy=PolicyReport(
            tier="unlimited",
            vram_gb=80,
            lm_loaded=False,
            table_version="1",
            limits=LimitsReport(max_duration_s=max_duration_s, max_batch_size=8),
        ),
        seeds=seeds,
    )


def plan(*codes: str, **metas: Any) -> Plan:
    return Plan(metas=Metas(**metas), audio_codes=codes)


def codes(count: int, first: int = 0) -> str:
    return format_codes(range(first, first + count))


NO_PLAN, NO_INPUTS = plan(), DecodedInputs()


def translate(
    job: Job, plan: Plan = NO_PLAN, model: LoadedModel = BASE, inputs: DecodedInputs = NO_INPUTS
) -> PipelineArguments:
    return arguments_for(job, plan, model, inputs)


def test_a_bare_request_becomes_the_pipeline_defaults() -> None:
    made = translate(job(prompt="jazz", lyrics="la la"))
    assert {field.name: getattr(made, field.name) for field in fields(made)} == {
        "prompt": "jazz",
        "lyrics": "la la",
        "vocal_language": "en",
        "instruction": None,
        "bpm": None,
        "keyscale": None,
        "timesignature": None,
        "task_type": "text2music",
        "track_name": None,
        "track_classes": (),
        "num_inference_steps": 8,
        "shift": 3.0,
        "timesteps": None,
        "guidance_scale": 7.0,
        "cfg_interval_start": 0.0,
        "cfg_interval_end": 1.0,
        "use_adg": False,
        "audio_cover_strength": 1.0,
        "cover_noise_strength": 0.0,
        "sampler": SamplerOptions(heun_last_step=True),
        "flow_edit": None,
        "retake_seeds": (0,),
        "retake_variance": 0.0,
        "device_noise": False,
        "audio_duration": None,
        "src_audio": None,
        "src_latents": None,
        "reference_audio": None,
        "repainting_start": None,
        "repainting_end": None,
        "explicit_mask": False,
        "keep": KeepRules(ratio=0.5, latent_frames=12, samples_s=0.025),
        "audio_codes": (),
        "seeds": (7,),
        "tiled": True,
        "output": OutputRules(),
        "align": False,
        "edits": (),
        "adjustments": (),
        "warnings": (),
    }
    assert (made.model_task, made.guided) == ("text2music", True)


def test_every_argument_is_set_from_the_job_and_none_left_at_its_default() -> None:
    """Defaults are for songs without a job, such as the warm-up."""
    tree = ast.parse(inspect.getsource(arguments_for))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "PipelineArguments"
    )
    assert {keyword.arg for keyword in call.keywords} == {field.name for field in fields(PipelineArguments)}


def test_the_plan_comes_before_the_request() -> None:
    asked = job(prompt="jazz", lyrics="la", bpm=90, key_scale="C major", time_signature="3", audio_duration=20)
    metas = {"caption": "cool jazz", "lyrics": "do", "bpm": 100, "duration": 30.0, "keyscale": "A minor"}
    made = translate(asked, plan(**metas, timesignature="4", language="de"))
    assert (made.prompt, made.lyrics, made.vocal_language) == ("cool jazz", "do", "de")
    assert (made.bpm, made.keyscale, made.timesignature, made.audio_duration) == (100, "A minor", "4", 30.0)


def test_what_the_plan_leaves_open_comes_from_the_request() -> None:
    asked = job(prompt="jazz", bpm=90, key_scale="C major", time_signature="3", audio_duration=20, vocal_language="fr")
    made = translate(asked)
    assert (made.bpm, made.keyscale, made.timesignature) == (90, "C major", "3")
    assert (made.audio_duration, made.vocal_language) == (20.0, "fr")


def test_the_songs_of_a_batch_share_a_prompt_and_have_a_seed_each() -> None:
    made = translate(job(prompt="jazz", seeds=(1, 2, 3)))
    assert (made.prompt, made.seeds) == ("jazz", (1, 2, 3))


@pytest.mark.parametrize("lyrics", ["", "  ", "[inst]", "[Instrumental]", "[INSTRUMENTAL] "])
def test_lyrics_are_read_as_they_are_written(lyrics: str) -> None:
    assert translate(job(lyrics=lyrics)).lyrics == lyrics


def test_a_caption_in_the_form_of_the_training_is_its_caption_alone() -> None:
    written = "# Instruction\nFill it:\n\n# Caption\nslow jazz,\nat night\n\n# Metas\n- bpm: 92"
    assert translate(job(prompt=written)).prompt == "slow jazz,\nat night"
    assert translate(job(prompt="# Caption\nslow jazz")).prompt == "# Caption\nslow jazz"


def test_a_model_with_a_global_caption_has_it_beside_that_of_the_part() -> None:
    asked = job(prompt="brushes", global_caption="a jazz trio", task_type="lego", chunk_mask_mode="explicit")
    model = replace(BASE, global_caption=True)
    made = translate(asked, model=model, inputs=SOURCE)
    assert made.prompt == "Global: a jazz trio\nLocal: brushes\nMask Control: true"
    assert translate(job(prompt="jazz"), model=model).prompt == "Global: \nLocal: jazz\nMask Control: false"


def test_samples_are_left_at_their_level_where_normalisation_is_off_or_above_full_scale() -> None:
    assert translate(job(enable_normalization=False)).output.peak is None
    assert translate(job(normalization_db=-20)).output.peak == pytest.approx(0.1)
    loud = translate(job(normalization_db=3))
    assert loud.output.peak is None
    assert loud.warnings == ("normalization_db = 3 is above full scale: the song is not normalised",)


@pytest.mark.parametrize("text", ["", "Fill the audio semantic mask based on the given conditions:"])
def test_the_instruction_that_clients_always_send_leaves_the_task_its_own(text: str) -> None:
    assert translate(job(instruction=text, task_type="repaint"), inputs=SOURCE).instruction is None


def test_an_instruction_of_ones_own_is_kept() -> None:
    assert translate(job(instruction="Sing it backwards:")).instruction == "Sing it backwards:"


@pytest.mark.parametrize(("given", "kept"), [("0.9,0.5,0", (0.9, 0.5)), ("0.9,0.5", (0.9, 0.5))])
def test_the_terminal_zero_of_timesteps_is_left_to_the_scheduler(given: str, kept: tuple[float, ...]) -> None:
    assert translate(job(timesteps=given)).timesteps == kept


def test_turbo_runs_without_guidance_and_says_so_only_when_it_was_asked_for() -> None:
    silent = translate(job(), model=TURBO)
    assert (silent.guidance_scale, silent.guided, silent.warnings) == (1.0, False, ())
    asked = translate(job(guidance_scale=4, cfg_interval_start=0.2, use_adg=True), model=TURBO)
    assert asked.guidance_scale == 1.0
    assert [text.split(" ")[0] for text in asked.warnings] == ["use_adg", "guidance_scale", "cfg_interval_start"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"audio_cover_strength": 0.5}, "audio_cover_strength"),
        ({"cover_noise_strength": 0.5}, "cover_noise_strength"),
        ({"sampler_mode": "heun", "infer_method": "sde"}, "sampler_mode"),
        ({"retake_seed": 4}, "retake_seed"),
        ({"dcw_enabled": True}, "dcw_enabled"),
        ({"timesteps": "0.9,0.5", "inference_steps": 20}, "inference_steps"),
        ({"src_audio_path": "s3://songs/a.mp3"}, "src_audio_path"),
        ({"mp3_bitrate": "320k", "audio_format": "flac"}, "mp3_bitrate"),
        ({"enable_normalization": False, "normalization_db": -3}, "normalization_db"),
        ({"global_caption": "a jazz trio"}, "global_caption"),
        ({"task_type": "extract", "chunk_mask_mode": "explicit"}, "chunk_mask_mode"),
        ({"task_type": "repaint", "repaint_mode": "aggressive", "repaint_strength": 0.9}, "repaint_strength"),
        ({"task_type": "cover", "audio_duration": 60, "src_audio_path": "s3://songs/a.mp3"}, "audio_duration"),
    ],
)
def test_what_has_no_effect_is_named(fields: dict[str, Any], named: str) -> None:
    (warning,) = translate(job(**fields), inputs=SOURCE).warnings
    assert warning.startswith(named)


def test_dcw_is_on_for_turbo_models_unless_the_request_says_otherwise() -> None:
    assert translate(job(), model=TURBO).sampler.dcw == Dcw()
    assert translate(job(dcw_enabled=False), model=TURBO).sampler.dcw is None
    asked = job(dcw_enabled=True, dcw_mode="high", dcw_scaler=0.1, dcw_high_scaler=0.2, dcw_wavelet="db4")
    assert translate(asked).sampler.dcw == Dcw(mode="high", scale=0.1, high_scale=0.2, wavelet="db4")


def test_the_second_pass_of_the_last_heun_step_is_for_models_with_guidance() -> None:
    assert translate(job(sampler_mode="heun")).sampler == SamplerOptions(heun=True, heun_last_step=True)
    assert not translate(job(sampler_mode="heun"), model=TURBO).sampler.heun_last_step


def test_the_options_of_the_sampler_are_those_of_the_request() -> None:
    asked = job(
        infer_method="sde", velocity_norm_threshold=2, velocity_ema_factor=0.2, latent_rescale=0.9, latent_shift=-0.1
    )
    assert translate(asked).sampler == SamplerOptions(
        method="sde",
        heun_last_step=True,
        velocity_limit=2.0,
        velocity_smoothing=0.2,
        rescale=0.9,
        offset=-0.1,
    )


def test_each_song_of_a_retake_mixes_in_noise_of_its_own() -> None:
    made = translate(job(retake_seed=4, retake_variance=0.5, seeds=(1, 2), noise="device"))
    assert (made.retake_seeds, made.retake_variance, made.device_noise) == ((4, 5), 0.5, True)


def test_a_flow_edit_has_the_source_of_text2music_and_a_plain_sampler() -> None:
    asked = job(
        flow_edit_morph=True,
        flow_edit_source_caption="piano",
        flow_edit_source_lyrics="hm",
        flow_edit_n_min=0.1,
        flow_edit_n_max=0.9,
        flow_edit_n_avg=2,
        sampler_mode="heun",
        use_adg=True,
        dcw_enabled=True,
    )
    made = translate(asked, model=BASE, inputs=SOURCE)
    assert made.src_audio is not None
    assert made.flow_edit == FlowEditRequest(caption="piano", lyrics="hm", start=0.1, end=0.9, averages=2)
    assert (made.sampler, made.use_adg) == (SamplerOptions(heun_last_step=True), False)


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "repaint", "lego", "extract", "complete"])
def test_strengths_of_a_source_count_wherever_there_is_one(task: str) -> None:
    asked = job(task_type=task, audio_cover_strength=0.4, cover_noise_strength=0.3)
    made = translate(asked, inputs=SOURCE)
    assert (made.audio_cover_strength, made.cover_noise_strength, made.switches) == (0.4, 0.3, True)


def test_a_cover_that_starts_from_its_source_is_said_to_be_silent_on_sft_and_xl() -> None:
    asked = job(task_type="cover", cover_noise_strength=0.3)
    for model in (replace(BASE, variant=Variant.SFT), replace(BASE, wide=True)):
        (warning,) = translate(asked, model=model, inputs=SOURCE).warnings
        assert warning.startswith("cover_noise_strength = 0.3")


def test_text2music_has_no_source() -> None:
    asked = job(src_audio_path="s3://songs/a.mp3")
    assert not reads_source(asked, plan())
    assert translate(asked, inputs=SOURCE).src_audio is None


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "repaint", "extract", "lego", "complete"])
def test_source_audio_decides_the_length(task: str) -> None:
    made = translate(job(task_type=task, audio_duration=20), inputs=SOURCE)
    assert reads_source(job(task_type=task), plan())
    assert made.src_audio is not None
    assert made.src_audio.shape == (2, 20 * 48_000)
    # The text of complete names the length that was asked for or planned.
    assert (made.audio_duration, made.warnings) == (20 if task == "complete" else None, ())


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "repaint", "extract", "lego", "complete"])
def test_a_task_without_its_source_is_refused(task: str) -> None:
    with pytest.raises(RenderFailed, match=f"task_type {task} needs source audio"):
        translate(job(task_type=task))


def test_tracks_are_passed_on() -> None:
    made = translate(job(task_type="complete", track_classes="drums,bass", track_name="vocals"), inputs=SOURCE)
    assert (made.track_classes, made.track_name) == (("drums", "bass"), "vocals")


@pytest.mark.parametrize("task", ["repaint", "lego"])
def test_a_window_without_an_end_reaches_to_the_end(task: str) -> None:
    made = translate(job(task_type=task, repainting_start=5, repainting_end=-1), inputs=SOURCE)
    assert (made.repainting_start, made.repainting_end) == (5.0, None)


def test_a_window_past_the_end_makes_the_song_longer() -> None:
    made = translate(job(task_type="repaint", repainting_start=15, repainting_end=23.5), inputs=NOISE)
    assert (made.repainting_start, made.repainting_end, made.audio_duration) == (15, 23.5, 20)
    assert_extended(made, before_s=0, after_s=3.5)


def test_a_window_beyond_both_ends_makes_all_of_the_source_anew_and_says_so() -> None:
    made = translate(job(task_type="repaint", repainting_start=-2, repainting_end=22), inputs=NOISE)
    assert made.kept_samples(48_000) is None
    assert [warning for warning in made.warnings if "beyond both ends of the source" in warning]
    one_side = translate(job(task_type="repaint", repainting_start=-2, repainting_end=4), inputs=NOISE)
    assert not [warning for warning in one_side.warnings if "beyond both ends" in warning]


def test_a_window_before_the_start_moves_with_the_song() -> None:
    made = translate(job(task_type="lego", repainting_start=-2.5, repainting_end=4), inputs=NOISE)
    assert (made.repainting_start, made.repainting_end, made.audio_duration) == (0, 6.5, 20)
    assert_extended(made, before_s=2.5, after_s=0)


def assert_extended(made: PipelineArguments, *, before_s: float, after_s: float) -> None:
    """The source audio is between two silences."""
    rate, source = 48_000, NOISE.source
    assert made.src_audio is not None
    assert source is not None
    before, length = int(before_s * rate), source.shape[1]
    assert made.src_audio.shape[1] == before + length + int(after_s * rate)
    assert torch.equal(made.src_audio[:, before : before + length], source)
    assert not made.src_audio[:, :before].any()
    assert not made.src_audio[:, before + length :].any()


def test_a_song_is_made_no_longer_than_the_tier_allows() -> None:
    asked: dict[str, Any] = {
        "task_type": "repaint",
        "repainting_start": 15,
        "repainting_end": 86_400,
        "max_duration_s": 30,
    }
    made = translate(job(**asked), inputs=SOURCE)
    assert made.src_audio is not None
    assert made.src_audio.shape == (2, 30 * 48_000)
    (cut,) = made.adjustments
    assert (cut.field, cut.requested, cut.applied) == ("audio_duration", 86_400, 30)
    with pytest.raises(LimitExceeded, match="the extended song"):
        translate(job(**asked, on_limit="reject"), inputs=SOURCE)
    left: dict[str, Any] = {"task_type": "repaint", "repainting_start": -86_400, "max_duration_s": 30}
    with pytest.raises(InvalidRequest, match="must leave room for the source audio"):
        translate(job(**left), inputs=SOURCE)


def test_a_window_that_ends_before_it_begins_is_the_whole_song() -> None:
    made = translate(job(task_type="repaint", repainting_start=5, repainting_end=5), inputs=SOURCE)
    assert (made.repainting_start, made.repainting_end) == (None, None)
    assert made.kept_samples(48_000) is None


@pytest.mark.parametrize(
    ("fields", "rules"),
    [
        ({"repaint_mode": "aggressive"}, KeepRules()),
        ({"repaint_mode": "conservative"}, KeepRules(ratio=1, latent_frames=25, samples_s=0.05)),
        ({"repaint_strength": 0.25}, KeepRules(ratio=0.75, latent_frames=19, samples_s=0.05 * 0.75)),
        (
            {"repaint_mode": "aggressive", "repaint_latent_crossfade_frames": 4, "repaint_wav_crossfade_sec": 0.5},
            KeepRules(ratio=0, latent_frames=4, samples_s=0.5),
        ),
    ],
)
def test_a_mode_keeps_as_much_as_it_says_and_named_cross_fades_win(fields: dict[str, Any], rules: KeepRules) -> None:
    made = translate(job(task_type="repaint", repainting_start=5, **fields), inputs=SOURCE)
    assert made.keep == rules
    kept = made.kept_samples(48_000)
    assert (None if kept is None else kept.fade) == (None if rules.samples_s is None else int(rules.samples_s * 48_000))
    turbo = translate(job(task_type="repaint", repainting_start=5, **fields), model=TURBO, inputs=SOURCE)
    assert turbo.keep == replace(rules, last_step=False)


def test_a_window_that_begins_past_the_end_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^repainting_start = 20: must be below .* source audio, 20\.00 seconds$"):
        translate(job(task_type="repaint", repainting_start=20), inputs=SOURCE)


def test_only_repaint_and_lego_have_a_window() -> None:
    assert translate(job(task_type="cover", repainting_start=5), inputs=SOURCE).repainting_start is None


def test_planned_codes_take_the_place_of_a_source() -> None:
    asked = job(task_type="cover", src_audio_path="s3://songs/a.mp3", seeds=(1, 2))
    planned = plan(codes(50), codes(50, 100), duration=10)
    assert not reads_source(asked, planned)
    made = translate(asked, planned, inputs=SOURCE)
    assert made.audio_codes == (tuple(range(50)), tuple(range(100, 150)))
    assert (made.audio_duration, made.src_audio) == (None, None)
    assert made.warnings == ("src_audio_path was not used: the song is made from audio codes",)


def test_codes_in_the_request_serve_every_song() -> None:
    made = translate(job(audio_code_string=codes(60), seeds=(1, 2)))
    assert made.audio_codes == (tuple(range(60)),) * 2
    assert made.model_task == "cover"
    assert made.audio_duration is None


def test_the_prompt_names_the_duration_that_is_given_with_codes() -> None:
    assert translate(job(audio_code_string=codes(60), audio_duration=12.5)).audio_duration == 12.5


def test_a_cover_from_codes_may_be_blended() -> None:
    made = translate(job(audio_code_string=codes(60), audio_cover_strength=0.5))
    assert (made.audio_cover_strength, made.warnings) == (0.5, ())


@pytest.mark.parametrize("bad", ["1,2,3", "<|audio_code_|>"])
def test_a_plan_whose_codes_hold_no_code_is_refused(bad: str) -> None:
    """A request's own are refused when it is read."""
    with pytest.raises(RenderFailed, match="holds no code"):
        translate(job(), plan(bad))


def test_songs_of_unequal_code_counts_are_refused() -> None:
    with pytest.raises(RenderFailed, match="equally many audio codes"):
        translate(job(seeds=(1, 2)), plan(codes(50), codes(51)))


def test_an_input_longer_than_the_tier_allows_is_cut_and_named() -> None:
    made = translate(job(task_type="cover", max_duration_s=12), inputs=SOURCE)
    assert made.src_audio is not None
    assert made.src_audio.shape == (2, 12 * 48_000)
    (cut,) = made.adjustments
    assert (cut.field, cut.requested, cut.applied) == ("audio_duration", 20, 12)
    assert cut.reason == "the source audio: 20.00 seconds, and this worker allows 12"
    made = translate(job(audio_code_string=codes(100), max_duration_s=12))
    assert made.audio_codes == (tuple(range(60)),)


def test_an_input_longer_than_the_tier_allows_is_rejected_on_request() -> None:
    with pytest.raises(LimitExceeded, match=r"20\.00 seconds, and this worker allows 12"):
        translate(job(task_type="cover", max_duration_s=12, on_limit="reject"), inputs=SOURCE)
    with pytest.raises(LimitExceeded, match=r"the audio codes: 20\.00 seconds"):
        translate(job(audio_code_string=codes(100), max_duration_s=12, on_limit="reject"))
