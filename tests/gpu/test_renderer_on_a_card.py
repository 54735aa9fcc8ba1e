# SPDX-License-Identifier: Apache-2.0
"""What only a card can show: compiled packs, graphs, offloading, real shortness of memory.

Run by hand: ``pytest -m gpu tests/gpu``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AceStepPipeline

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer.batch_request import RequestCallbacks
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.startup import open_studio
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO, write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm card")]

SONG: dict[str, Any] = {"prompt": ["jazz"], "lyrics": ["la"], "vocal_language": "en"}
NOTHING_ELSE: dict[str, Any] = {
    "instruction": None,
    "bpm": None,
    "keyscale": None,
    "timesignature": None,
    "task_type": "text2music",
    "track_name": None,
    "complete_track_classes": None,
    "num_inference_steps": 8,
    "shift": 3.0,
    "timesteps": None,
    "cfg_interval_start": 0.0,
    "cfg_interval_end": 1.0,
    "audio_cover_strength": 1.0,
    "reference_audio": None,
}
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


def batcher_with(checkpoints: Path, **settings: Any) -> Scheduler:
    chosen = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cuda", pack_wait_ms=50, **settings)
    return open_studio(chosen).batcher


def arguments(case: str, method: str = "ode", *, model: str = TURBO) -> PipelineArguments:
    given = {**NOTHING_ELSE, **CASES[case], "guidance_scale": 1.0 if model == TURBO else 7.0}
    if "task_type" in CASES[case]:
        noise = torch.randn(2, 3 * 48_000, generator=torch.Generator().manual_seed(1)) / 10
        given |= {"src_audio": noise, "reference_audio": noise}
    assert method in ("ode", "sde")
    return PipelineArguments(pipeline=given, seeds=(5,), steps=8, method=method, tiled=False)  # type: ignore[arg-type]  # above


def songs_of(batcher: Scheduler, *, together: bool = False) -> list[torch.Tensor]:
    """One song of each kind, all in flight at once or one after the other."""
    kinds = [(model, case, method) for model in (TURBO, BASE) for case in CASES for method in ("ode", "sde")]
    asked = (
        batcher.sing(model, arguments(case, method, model=model), None, RequestCallbacks())
        for model, case, method in kinds
    )
    begun = list(asked) if together else asked
    return [performance.sounds[0].result(timeout=300).wait() for performance in begun]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return one.shape == other.shape and bool((one - other).norm() / other.norm() < tolerance)


def test_songs_in_packs_on_a_card_are_those_made_alone(checkpoints: Path) -> None:
    """In bfloat16 a pack rounds otherwise than a song alone: kernels are chosen by size."""
    batcher = batcher_with(checkpoints)
    alone, together = songs_of(batcher), songs_of(batcher, together=True)
    assert [close(one, other, 0.1) for one, other in zip(together, alone, strict=True)] == [True] * len(alone)


def test_compiled_and_recorded_songs_are_those_of_plain_kernels(checkpoints: Path) -> None:
    fast, plain = batcher_with(checkpoints), batcher_with(checkpoints, compile=False)
    pairs = zip(songs_of(fast), songs_of(plain), strict=True)
    assert all(close(one, other, 0.1) for one, other in pairs)


@pytest.mark.parametrize("keep_dit", [False, True])
def test_offloading_changes_no_song_and_leaves_the_card_empty(*, keep_dit: bool, checkpoints: Path) -> None:
    batcher = batcher_with(checkpoints, offload=True, offload_dit=not keep_dit)
    expected = songs_of(batcher_with(checkpoints, offload=False))
    assert all(close(one, other, 0.1) for one, other in zip(songs_of(batcher), expected, strict=True))
    for _ in range(2):  # before the second errand the device's thread has found that nothing is left to do
        batcher.errand(lambda: None)
    for booth in batcher._booths.values():
        parts = {
            name: part for name, part in booth.parts.pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        places = {name: next(part.parameters()).device.type for name, part in parts.items()}
        assert places.pop("transformer") == ("cuda" if keep_dit else "cpu")
        assert set(places.values()) == {"cpu"}


def test_out_of_memory_on_the_card_moves_models_to_ram_and_the_song_is_the_same(checkpoints: Path) -> None:
    batcher = batcher_with(checkpoints)
    (expected, *_) = songs_of(batcher)
    booth = batcher._booths[TURBO]
    step, failures = booth.step, iter([torch.OutOfMemoryError("CUDA out of memory")])

    def short_of_memory_once(*given: Any) -> Any:
        for error in failures:
            raise error
        return step(*given)

    booth.step = short_of_memory_once  # type: ignore[assignment,method-assign]  # a fault to order
    performance = batcher.sing(TURBO, arguments("text2music"), None, RequestCallbacks())
    assert close(performance.sounds[0].result(timeout=300).wait(), expected, 0.1)
    assert performance.notes == ["memory ran out: models wait in RAM between uses from now on"]


@pytest.mark.parametrize("case", ["text2music", "codes"])
@pytest.mark.parametrize("model", [TURBO, BASE])
def test_a_song_in_bfloat16_is_as_near_to_float32_as_plain_diffusers(model: str, case: str, checkpoints: Path) -> None:
    half, exact = (plainly(checkpoints / model, case, dtype) for dtype in (torch.bfloat16, torch.float32))
    (sound,) = batcher_with(checkpoints).sing(model, arguments(case, model=model), None, RequestCallbacks()).sounds
    ours = sound.result(timeout=300).wait()
    assert ours.shape == exact.shape
    assert (ours - exact).norm() < 1.25 * (half - exact).norm()


def plainly(folder: Path, case: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the song that diffusers makes of the same arguments."""
    with quietly():
        pipeline = AceStepPipeline.from_pretrained(folder, dtype=dtype).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    audios = pipeline(**CASES[case], generator=torch.Generator().manual_seed(5)).audios
    return torch.as_tensor(audios[0]).float().cpu()
