# SPDX-License-Identifier: Apache-2.0
"""A request that cannot be right ends as the producer's fault, with a text that says what to change.

Never as ``render_failed`` or ``internal_error``, which say that the worker is at fault.
"""

import asyncio
import base64
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.errors import ConsumerError, InputUnreadable, InvalidRequest
from acestep_consumer.domain.job import Rendering, Request, Sources
from acestep_consumer.engine.adapters import DirectPlanner
from acestep_consumer.engine.messages import FROM_ENGINE, Render, RequestFailed
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.render import render
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.policy.admit import admit
from acestep_schemas.events import LmChoice
from acestep_schemas.request import RequestInvalid, parse_request
from tests.support.admission import make_limits
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.fake_engine import FakeRenderer
from tests.support.loras import RANK, diffusers_key, random_lora, write_lora, write_peft_lora
from tests.support.scheduler_harness import recording
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

Q = "layers.0.self_attn.to_q"
PRODUCERS_FAULT = ("invalid_request", "input_unreadable", "malformed_body", "limit_exceeded", "task_unsupported")


@pytest.fixture(scope="module")
def resources(tiny_checkpoints: Path) -> RenderResources:
    """The tiny models."""
    chosen = EngineSettings(
        checkpoint_dir=tiny_checkpoints, config_path2="acestep-v15-base", device="cpu", pack_wait_ms=0
    )
    return RenderResources(startup.open_runtime(chosen).scheduler)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of sound."""
    return recording(tmp_path_factory.mktemp("source") / "source", seconds=2, hz=220)


async def rendered(
    resources: RenderResources, folder: Path, sources: Sources | None = None, **fields: Any
) -> Rendering:
    """Do with a request's fields all that a worker does before it uploads. Raises the error that it would tell."""
    body, warnings = parse_request({"prompt": "jazz", "audio_format": "wav", "inference_steps": 1, **fields})
    job = admit(Request("job", body, warnings), make_limits())
    if job.request.audio_duration or sources is None or sources.source is None:  # a second shows as much as minutes
        job = replace(job, request=job.request.model_copy(update={"audio_duration": 1.0}))
    plan = await DirectPlanner(FakeRenderer()).plan(job, Sources(), lambda *_: None)
    message = Render(request_id=1, job=job, plan=plan, sources=sources or Sources(), folder=folder)
    return render(resources, message, lambda *_: None, lambda: False)


async def complaint(resources: RenderResources, folder: Path, sources: Sources, **fields: Any) -> ConsumerError:
    with pytest.raises(ConsumerError) as caught:
        await rendered(resources, folder, sources, **fields)
    return caught.value


async def test_a_repaint_that_starts_past_the_end_is_the_requests_fault(
    resources: RenderResources, source: Path, tmp_path: Path
) -> None:
    fields = {"task_type": "repaint", "src_audio_path": "s3://acestep/a.wav", "repainting_start": 7}
    error = await complaint(resources, tmp_path, Sources(source=source), **fields)
    assert isinstance(error, InvalidRequest)
    (problem,) = error.problems
    assert (problem.field, problem.value) == ("repainting_start", "7")
    assert problem.rule == "must be below the length of the source audio, 2.00 seconds"
    # The error crosses a pipe on its way to the event.
    sent = FROM_ENGINE.validate_json(FROM_ENGINE.dump_json(RequestFailed.of(1, error)))
    assert isinstance(sent, RequestFailed)
    assert sent.problems == error.problems


@pytest.mark.parametrize("text", ["7,8,9", "<|audio_code_|>", "<|audio_code_x|>", "[1, 2]", "<|audio_code_1|"])
def test_audio_codes_without_a_code_are_refused_before_anything_runs(text: str) -> None:
    with pytest.raises(ValueError, match=r"audio_code_string = .*: must hold audio codes.*audio_code_123"):
        parse_request({"audio_code_string": text})


@pytest.mark.parametrize("digits", ["9" * 10, "9" * 5_000, "0" * 5_000 + "7"])
async def test_a_code_of_any_number_of_digits_is_rendered(
    resources: RenderResources, tmp_path: Path, digits: str
) -> None:
    codes = f"<|audio_code_{digits}|>" * 5
    rendering = await rendered(resources, tmp_path, audio_code_string=codes)
    assert rendering.tracks[0].duration_s == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-30, 1e-9])
@pytest.mark.parametrize("field", ["shift", "lm_repetition_penalty"])
def test_numbers_that_leave_float32_are_refused_before_anything_runs(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} = .*: must be at least 0\.001"):
        parse_request({field: value}, strict=True)


@pytest.mark.parametrize("model", ["acestep-v15-turbo", "acestep-v15-base"])
async def test_the_smallest_shift_is_rendered(resources: RenderResources, tmp_path: Path, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "shift": 0.001, "inference_steps": 3, "audio_duration": 10}
    assert (await rendered(resources, tmp_path, **fields)).tracks


@pytest.mark.parametrize("model", ["acestep-v15-turbo", "acestep-v15-base"])
async def test_a_guidance_interval_that_is_empty_guides_no_step(
    resources: RenderResources, tmp_path: Path, model: str
) -> None:
    fields: dict[str, Any] = {"model": model, "inference_steps": 2, "audio_duration": 10, "seed": 1}
    empty = await rendered(resources, tmp_path, **fields, cfg_interval_start=6202, cfg_interval_end=1.192092896e-07)
    without_guidance = empty.tracks[0].path.read_bytes()
    plain = await rendered(resources, tmp_path, **fields, guidance_scale=1)
    assert plain.tracks[0].path.read_bytes() == without_guidance


async def test_an_analysis_of_audio_without_audio_is_the_requests_fault() -> None:
    body, _ = parse_request({"full_analysis_only": True})
    limits = replace(make_limits(), lm=LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt"))
    with pytest.raises(InvalidRequest, match=r"^src_audio_path = : full_analysis_only needs source audio"):
        admit(Request("job", body), limits)


def other_models_lora(folder: Path) -> Path:
    return write_lora(
        folder / "a.safetensors",
        {diffusers_key(Q, "A"): torch.ones(RANK, 64), diffusers_key(Q, "B"): torch.ones(64, RANK)},
    )


def alpha(value: torch.Tensor) -> Any:
    def write(folder: Path) -> Path:
        tensors = random_lora([Q], key=lambda layer, side: f"{layer}.lora_{'down' if side == 'A' else 'up'}.weight")
        return write_lora(folder / "a.safetensors", {**tensors, f"{Q}.alpha": value})

    return write


@pytest.mark.parametrize(
    ("write", "scale", "said"),
    [
        (other_models_lora, 1, "does not fit this model.*use one that was trained for it"),
        (alpha(torch.tensor(1 + 2j)), 1, "is a complex number: alpha must be a real one"),
        (alpha(torch.tensor(1e300, dtype=torch.float64)), 1, "alpha for .* is too large"),
        (alpha(torch.tensor(float("nan"))), 1, "not all finite"),
        (lambda folder: write_peft_lora(folder, alpha=1e300), 1, "alpha for .* is too large"),
        (lambda folder: write_peft_lora(folder, alpha=-1e300), 1, "alpha for .* is too large"),
        (
            lambda folder: write_lora(folder / "a.safetensors", random_lora(strength=1e19)),
            4,
            "is too strong: .*lora.scale",
        ),
        (lambda folder: write_lora(folder / "a.safetensors", random_lora(strength=1e17)), 1, "lower lora.scale, now 1"),
    ],
    ids=["another model", "complex", "huge", "nan", "peft", "negative", "overflow", "not finite"],
)
async def test_a_lora_that_cannot_be_applied_is_an_input_that_cannot_be_read(
    resources: RenderResources, tmp_path: Path, write: Any, scale: float, said: str
) -> None:
    lora = {"path": "jazz", "scale": scale}
    error = await complaint(resources, tmp_path, Sources(loras=(write(tmp_path / "lora"),)), lora=lora)
    assert isinstance(error, InputUnreadable)
    assert error.code == "input_unreadable"
    with pytest.raises(InputUnreadable, match=said):
        raise error


@pytest.mark.parametrize("seconds", [1 / 48_000, 0.001, 0.02])
@pytest.mark.parametrize("which", ["source", "reference"])
async def test_audio_that_is_too_short_for_the_model_is_an_input_that_cannot_be_read(
    resources: RenderResources, tmp_path: Path, seconds: float, which: str
) -> None:
    short = recording(tmp_path / "short", seconds=seconds, hz=220)
    sources = Sources(source=short) if which == "source" else Sources(reference=short)
    fields: dict[str, Any] = {"task_type": "cover", "src_audio_path": "s3://acestep/a.wav"} if which == "source" else {}
    error = await complaint(resources, tmp_path, sources, **fields)
    assert isinstance(error, InputUnreadable)
    assert str(error).startswith(f"the {which} audio is too short")


ODD_NUMBERS = (
    st.sampled_from([0, -1, 1, 5e-324, 1e-320, 1e-30, 1e-7, 0.5, 0.999999, 1.0, 2.0, 3.999, 10, 30, 1e9, 1e300, 2**63])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**64), 2**64)
)
ODD_TEXT = st.text(max_size=40) | st.sampled_from(["<|endoftext|>", "\x00", "[inst]", "\u202e" * 9, "a" * 3_000])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": ODD_TEXT,
    "lyrics": ODD_TEXT,
    "instruction": ODD_TEXT,
    "track_name": ODD_TEXT,
    "track_classes": st.lists(ODD_TEXT, max_size=3),
    "vocal_language": ODD_TEXT,
    "task_type": st.sampled_from(["text2music", "cover", "repaint", "extract", "lego", "complete"]),
    "model": st.sampled_from(["acestep-v15-turbo", "acestep-v15-base"]),
    "infer_method": st.sampled_from(["ode", "sde"]),
    "timesteps": st.lists(ODD_NUMBERS, max_size=4)
    | st.lists(st.floats(0, 1), max_size=4).map(lambda times: sorted(times, reverse=True)),
    "audio_code_string": st.sampled_from(
        ["<|audio_code_0|>", "<|audio_code_63999|>" * 7, "<|audio_code_64001|>x" * 3, "7"]
    ),
    "use_tiled_decode": st.booleans(),
    "seed": ODD_NUMBERS,
    **dict.fromkeys(
        [
            *("bpm", "guidance_scale", "shift", "cfg_interval_start", "cfg_interval_end", "audio_cover_strength"),
            *("repainting_start", "repainting_end", "audio_duration"),
        ],
        ODD_NUMBERS,
    ),
}


# Short ones with few steps, unless a field says otherwise: most of a long song's time tells nothing new.
SOON: dict[str, Any] = {"audio_duration": 10, "inference_steps": 2}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=st.fixed_dictionaries({}, optional=FIELDS), inputs=st.sets(st.sampled_from(["source", "reference"])))
def test_whatever_a_request_holds_it_is_rendered_or_its_producer_is_told_why_not(
    resources: RenderResources,
    source: Path,
    tmp_path_factory: pytest.TempPathFactory,
    fields: dict[str, Any],
    inputs: set[str],
) -> None:
    if "source" in inputs:
        fields |= {"src_audio_path": "s3://acestep/a.wav"}
    copies: dict[str, Any] = dict.fromkeys(inputs, source)
    sources, folder = Sources(**copies), tmp_path_factory.mktemp("job")
    try:
        rendering = asyncio.run(rendered(resources, folder, sources, **SOON | fields))
    except RequestInvalid:
        return
    except ConsumerError as error:
        told = error
    else:
        assert rendering.tracks[0].duration_s > 0
        return
    assert told.code in PRODUCERS_FAULT, str(told)


def as_base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


async def test_a_worker_rejects_it_with_field_value_and_rule_and_goes_on(
    own_worker_environment: dict[str, str], tmp_path: Path, source: Path
) -> None:
    environment = own_worker_environment | {"ACESTEP_CONFIG_PATH2": ""}
    async with (
        running(WorkerProcess(tmp_path, environment)),
        EventRecorder(environment["ACESTEP_AMQP_URL"]) as recorder,
        Peer(environment["ACESTEP_AMQP_URL"]) as peer,
    ):
        await peer.submit(task_id="song", audio_format="wav")
        await eventually(lambda: recorder.terminal("song"), 60)
        (song,) = recorder.terminal("song")[0].data["audios"]
        repaint = {"task_type": "repaint", "src_audio_path": song["uri"], "repainting_start": 99}
        await peer.submit(task_id="past-the-end", **repaint)
        await peer.submit(task_id="no-code", audio_code_string="1,2,3")
        body = json.dumps({"task_id": "packed", "prompt": "x", "audio_format": "wav", "audio_duration": 10}).encode()
        await peer.request(gzip.compress(body), content_encoding="gzip")
        await peer.request(b"\x0b\x02\x80", content_encoding="br", message_id="other-packing")
        await peer.submit(task_id="embedded", task_type="cover", src_audio_base64=as_base64(source), audio_format="wav")
        await peer.submit(task_id="no-sound", task_type="cover", src_audio_base64="bm8gc291bmQ=")
        await peer.submit(task_id="no-base64", task_type="cover", src_audio_base64="?")
        names = ("past-the-end", "no-code", "packed", "other-packing", "embedded", "no-sound", "no-base64")
        await eventually(lambda: all(map(recorder.terminal, names)), 60)
    ends = {name: recorder.terminal(name)[0] for name in names}
    assert {name: end.state for name, end in ends.items()} == dict.fromkeys(names, "rejected") | {
        "packed": "completed",
        "embedded": "completed",
        "no-sound": "failed",
    }
    assert ends["embedded"].data["audios"][0]["duration_s"] == pytest.approx(2, abs=0.1)
    assert ends["no-sound"].data["error"]["code"] == "input_unreadable"
    assert "src_audio_base64 = 1 characters: must be a file in Base64" in ends["no-base64"].data["error"]["message"]
    error = ends["past-the-end"].data["error"]
    assert (error["code"], error["retryable"]) == ("invalid_request", False)
    assert error["details"] == [
        {
            "field": "repainting_start",
            "value": "99",
            "rule": "must be below the length of the source audio, 10.00 seconds",
        }
    ]
    assert ends["no-code"].data["error"]["code"] == "invalid_request"
    assert "content_encoding 'br' is not supported" in ends["other-packing"].data["error"]["message"]
