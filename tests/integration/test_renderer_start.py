# SPDX-License-Identifier: Apache-2.0
"""The renderer's start: checkpoints on disk, models in memory, and the report."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acestep_consumer.audio.formats import FORMATS
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.domain.tasks import Variant
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.checkpoints.checkpoint import load_models, variant_of
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError
from acestep_consumer.engine.renderer.denoising.attention import Kernel, sdpa_per_sequence
from acestep_consumer.engine.renderer.device import DeviceReport, Offload
from acestep_consumer.engine.renderer.startup import acceleration_for, open_runtime
from acestep_consumer.engine.testing.tiny_checkpoint import write
from tests.support.waiting import WITHIN_S

ROOT = Path(__file__).parents[2]
TURBO, BASE = "acestep-v15-turbo", "acestep-v15-base"
CPU = DeviceReport(device="cpu", name="CPU", vram_gb=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


def settings(checkpoints: Path, *models: str, **more: object) -> EngineSettings:
    names = dict(zip(("config_path", "config_path2", "config_path3"), models, strict=False))
    return EngineSettings.model_validate({"checkpoint_dir": checkpoints, "device": "cpu", **names, **more})


def quiet(_: str) -> None:
    """Ignore progress."""


def flash(*_: object) -> torch.Tensor:
    """Stand for a kernel that reads lengths on the device."""
    raise NotImplementedError


def test_the_report_says_what_is_there(checkpoints: Path) -> None:
    notes: list[str] = []
    opened = open_runtime(settings(checkpoints, TURBO, BASE), lambda step, _: notes.append(step))
    report = opened.report
    assert report.models == (LoadedModel(TURBO, Variant.TURBO), LoadedModel(BASE, Variant.BASE))
    assert (report.device, report.vram_gb, report.offload) == ("cpu", 0, False)
    assert (report.attention, report.compiled) == ("sdpa per sequence", False)
    assert (report.formats, report.warnings) == (tuple(FORMATS), ())
    assert set(opened.scheduler.models) == {TURBO, BASE}
    assert [text.split(" from ")[0] for text in notes if text.startswith("loading")] == [
        f"loading {TURBO}",
        f"loading {BASE}",
    ]


def test_models_with_the_same_text_encoder_and_vae_hold_them_once(checkpoints: Path) -> None:
    turbo, base = load_models(settings(checkpoints, TURBO, BASE), CPU, quiet)
    assert turbo.pipeline.text_encoder is base.pipeline.text_encoder
    assert turbo.pipeline.vae is base.pipeline.vae
    assert turbo.pipeline.transformer is not base.pipeline.transformer


def test_a_vae_of_the_same_shape_with_other_weights_is_not_shared(checkpoints: Path, tmp_path: Path) -> None:
    """One changed byte at the end of the file: the header, and so every name and shape, is the same."""
    shutil.copytree(checkpoints / BASE, tmp_path / "finetuned")
    weights = tmp_path / "finetuned/vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    turbo, tuned = load_models(settings(checkpoints, TURBO, str(tmp_path / "finetuned")), CPU, quiet)
    assert turbo.pipeline.vae is not tuned.pipeline.vae
    assert turbo.pipeline.text_encoder is tuned.pipeline.text_encoder
    assert tuned.model == LoadedModel("finetuned", Variant.BASE)


def test_a_model_named_twice_is_loaded_once(checkpoints: Path) -> None:
    handles = load_models(settings(checkpoints, TURBO, str(checkpoints / TURBO)), CPU, quiet)
    assert [handle.model.name for handle in handles] == [TURBO]


def test_two_models_share_weights_and_nothing_that_a_song_changes(checkpoints: Path) -> None:
    opened = open_runtime(settings(checkpoints, TURBO, BASE))
    one, other = (runner.parts for runner in opened.scheduler._runners.values())
    assert one.pipeline.text_encoder is other.pipeline.text_encoder
    assert one.decoder is other.decoder
    assert [a.data_ptr() for a in one.vae.parameters()] == [b.data_ptr() for b in other.vae.parameters()]
    assert one.vae is not other.vae
    assert one.pipeline.tokenizer is not other.pipeline.tokenizer


def test_a_missing_second_model_is_found_out_before_the_first_is_loaded(checkpoints: Path) -> None:
    notes: list[str] = []
    with pytest.raises(CheckpointError, match=r"was not found.*: acestep-consumer models pull acestep-v15-sft"):
        load_models(settings(checkpoints, TURBO, "acestep-v15-sft"), CPU, notes.append)
    assert notes == []


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_not_safetensors_are_not_read(part: str, checkpoints: Path, tmp_path: Path) -> None:
    """A pickle can run code when it is read."""
    shutil.copytree(checkpoints / TURBO, tmp_path / "model")
    for weights in (tmp_path / "model" / part).glob("*.safetensors"):
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
    with pytest.raises(CheckpointError, match="model model cannot be loaded from"):
        load_models(settings(checkpoints, str(tmp_path / "model")), CPU, quiet)


def test_a_damaged_file_is_named_with_its_model(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / TURBO, tmp_path / "model")
    (tmp_path / "model/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="model model cannot be loaded from"):
        load_models(settings(checkpoints, str(tmp_path / "model")), CPU, quiet)


def test_a_hub_model_is_not_asked_for_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="my-song-model cannot be loaded from somebody/"):
        load_models(settings(tmp_path, "somebody/my-song-model"), CPU, quiet)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("anything", {"is_turbo": True}, Variant.TURBO),
        ("anything", {"model_version": "turbo"}, Variant.TURBO),
        ("acestep-v15-sft", {"is_turbo": False, "model_version": None}, Variant.SFT),
        ("mine", {"model_version": "sft"}, Variant.SFT),
        ("mine", {"model_version": "base"}, Variant.BASE),
        ("mine", {}, Variant.BASE),
    ],
)
def test_the_family_is_read_from_config_and_name(name: str, config: dict[str, object], expected: Variant) -> None:
    assert variant_of(name, config) is expected


def test_offloading_is_reported_and_every_component_is_registered(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloading itself needs a GPU; the decision does not."""
    monkeypatch.setattr(startup, "offload_for", lambda *_: Offload(models=True, dit=True))
    opened = open_runtime(settings(checkpoints, TURBO, BASE))
    assert opened.report.offload
    swappers = [runner.parts.swapper for runner in opened.scheduler._runners.values()]
    assert swappers[0] is not None
    assert swappers[0] is swappers[1]


@pytest.mark.parametrize(
    ("kernel", "offload", "graphed"),
    [
        (flash, Offload(), True),
        (flash, Offload(models=True), False),
        (sdpa_per_sequence, Offload(), False),
    ],
    ids=["FlashAttention", "offloaded", "an older card, or AMD's"],
)
def test_steps_that_cannot_be_captured_are_launched(
    kernel: Kernel, offload: Offload, monkeypatch: pytest.MonkeyPatch, *, graphed: bool
) -> None:
    """Torch's ordinary attention waits for the lengths of a pack, which fails a capture, and with it the worker."""
    monkeypatch.setattr(startup, "fastest_kernel", lambda *_: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    card = DeviceReport(device="cuda:0", name="a card", vram_gb=80)
    accelerated = acceleration_for(card, EngineSettings(), offload)
    assert accelerated.compiled
    assert (accelerated.graphs is not None) == graphed


def test_threads_that_operators_used_to_ask_for_are_named_as_needless(checkpoints: Path) -> None:
    (warning,) = open_runtime(settings(checkpoints, TURBO, lanes=4)).report.warnings
    assert warning.startswith("ACESTEP_API_WORKERS = 4 has no effect")


def test_the_warm_up_song_has_audio_and_leaves_no_batch_behind(checkpoints: Path) -> None:
    """GPUs render it at start. Its peak is at -1 dBFS, and no batch of it stays."""
    opened = open_runtime(settings(checkpoints, TURBO, BASE))
    for runner in opened.scheduler._runners.values():
        assert opened.scheduler.run_on_device(runner.render_warm_up) == pytest.approx(10 ** (-1 / 20), abs=1e-3)
        assert runner.denoiser(None)._layout is None


def test_offloading_that_frees_nothing_is_named(checkpoints: Path) -> None:
    report = open_runtime(settings(checkpoints, TURBO, offload=True)).report
    assert not report.offload
    assert report.warnings[0].startswith("ACESTEP_OFFLOAD_TO_CPU has no effect on cpu")


def test_tiny_checkpoints_are_the_same_every_time_and_leave_the_callers_randomness_alone(
    checkpoints: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert write(tmp_path) == (tmp_path / TURBO, tmp_path / BASE)
    assert torch.equal(torch.rand(3), expected)
    names = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(names) > 30
    assert all((tmp_path / name).read_bytes() == (checkpoints / name).read_bytes() for name in names)
    assert "random" in (tmp_path / TURBO / "README.md").read_text(encoding="utf-8")


def test_the_tiny_model_speaks_the_real_models_dimensions(checkpoints: Path) -> None:
    (handle,) = load_models(settings(checkpoints, TURBO), CPU, quiet)
    assert (handle.model.sample_rate, handle.model.latent_rate) == (48_000, 25.0)
    assert handle.pipeline.audio_tokenizer.quantizer.codebook_size == 64_000
    assert handle.pipeline.condition_encoder.silence_latent.shape[1] == 15_000


def test_the_consumer_side_of_the_engine_imports_no_torch() -> None:
    code = (
        "import sys, acestep_consumer.audio.formats;"
        "import acestep_consumer.engine.messages, acestep_consumer.engine.supervisor;"
        "sys.exit(any(name.split('.')[0] in ('torch', 'diffusers', 'av', 'numpy') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=WITHIN_S).returncode == 0
