# SPDX-License-Identifier: Apache-2.0
"""What only a card can show: offloading, and lanes that share one. Run by hand: ``pytest -m gpu tests/gpu``."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AceStepPipeline

from consumer.engine.renderer.arguments import Arguments
from consumer.engine.renderer.checkpoint import load_models
from consumer.engine.renderer.device import inspect, offload_for
from consumer.engine.renderer.lane import Lane
from consumer.engine.renderer.quiet import quietly
from consumer.engine.tiny_checkpoint import BASE, TURBO, write
from consumer.settings import EngineSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm card")]

SONG: dict[str, Any] = {"prompt": ["jazz"], "lyrics": ["la"], "vocal_language": "en"}
CASES: dict[str, dict[str, Any]] = {
    "text2music": {**SONG, "audio_duration": 10.0},
    "codes": {**SONG, "audio_codes": ["<|audio_code_61|>" * 50], "audio_duration": None},
    "cover": {**SONG, "task_type": "cover", "audio_cover_strength": 0.5, "audio_duration": None},
    "repaint": {**SONG, "task_type": "repaint", "repainting_start": 1.0, "audio_duration": None},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


def lane_with(checkpoints: Path, **settings: Any) -> Lane:
    chosen = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cuda", **settings)
    device = inspect(chosen)
    return Lane(load_models(chosen, device, lambda _: None), device, offload_for(device, chosen))


def arguments(case: str, method: str = "ode") -> Arguments:
    given = dict(CASES[case])
    if "task_type" in given:
        noise = torch.randn(2, 3 * 48_000, generator=torch.Generator().manual_seed(1)) / 10
        given |= {"src_audio": noise, "reference_audio": noise}
    assert method in ("ode", "sde")
    return Arguments(pipeline=given, seeds=(5,), steps=8, method=method, tiled=False)  # type: ignore[arg-type]  # above


def songs_of(lane: Lane) -> list[torch.Tensor]:
    return [
        lane.sing(model, arguments(case, method), lambda _: None)
        for model in (TURBO, BASE)
        for case in CASES
        for method in ("ode", "sde")
    ]


@pytest.mark.parametrize("keep_dit", [False, True])
def test_offloading_changes_no_song_and_leaves_the_card_empty(*, keep_dit: bool, checkpoints: Path) -> None:
    lane = lane_with(checkpoints, offload=True, offload_dit=not keep_dit)
    expected = songs_of(lane_with(checkpoints, offload=False))
    assert all(torch.equal(one, other) for one, other in zip(songs_of(lane), expected, strict=True))
    for booth in lane._booths.values():
        parts = {name: part for name, part in booth._pipeline.components.items() if isinstance(part, torch.nn.Module)}
        places = {name: next(part.parameters()).device.type for name, part in parts.items()}
        assert places.pop("transformer") == ("cuda" if keep_dit else "cpu")
        assert set(places.values()) == {"cpu"}


def test_lanes_on_one_card_sing_what_each_sings_alone(checkpoints: Path) -> None:
    chosen = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cuda", offload=False)
    device = inspect(chosen)
    handles = load_models(chosen, device, lambda _: None)
    lanes = [Lane(handles, device) for _ in range(3)]
    expected = songs_of(lanes[0])
    with ThreadPoolExecutor(3) as pool:
        for songs in pool.map(songs_of, lanes):
            assert all(torch.equal(one, other) for one, other in zip(songs, expected, strict=True))


@pytest.mark.parametrize("case", ["text2music", "codes"])
@pytest.mark.parametrize("model", [TURBO, BASE])
def test_a_song_in_bfloat16_equals_plain_diffusers(model: str, case: str, checkpoints: Path) -> None:
    with quietly():
        plain = AceStepPipeline.from_pretrained(checkpoints / model, dtype=torch.bfloat16).to("cuda")
    plain.set_progress_bar_config(disable=True)
    theirs = plain(**CASES[case], generator=torch.Generator().manual_seed(5)).audios
    ours = lane_with(checkpoints).sing(model, arguments(case), lambda _: None)
    assert torch.equal(ours, theirs.float().cpu())
