# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder's fused kernels, run by Triton's interpreter on the CPU, give the plain decoder's sound."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck
from structlog.testing import capture_logs

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer.decoder.vae_decode import TileDecoder
from acestep_consumer.engine.renderer.device import DeviceReport, Offload
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.renderer.startup import acceleration_for

pytest.importorskip("triton")

_PACKAGE = "acestep_consumer.engine.renderer.decoder"
_MODULES = (f"{_PACKAGE}.decoder_kernels", f"{_PACKAGE}.fused_decoder")


@pytest.fixture(scope="module")
def fused() -> Iterator[ModuleType]:
    """The module, with kernels that are interpreted: whether they are is decided when they are defined."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        for name in _MODULES:
            patched.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(_MODULES[1])
        for name in _MODULES:
            sys.modules.pop(name, None)


def random_vae(ratios: list[int], channels: int = 16) -> Any:
    """A VAE whose every weight, bias and activation parameter matters."""
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(3)
        vae = AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=ratios,
            channel_multiples=[1, 2],
            decoder_channels=channels,
            decoder_input_channels=16,
        )
        for name, parameter in vae.decoder.named_parameters():
            if name.rpartition(".")[2] in ("alpha", "beta", "bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    for module in vae.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)
    return vae.eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("ratios", "tma", "unit_channels"),
    [([2, 4], True, 128), ([2, 4], False, 16), ([2, 3], True, 128)],
    ids=["copy engine", "pointers, units in two kernels", "an odd stride"],
)
def test_fused_kernels_give_the_plain_decoders_sound(
    fused: Any, monkeypatch: pytest.MonkeyPatch, *, ratios: list[int], tma: bool, unit_channels: int
) -> None:
    monkeypatch.setattr(fused, "_UNIT_CHANNELS", unit_channels)
    vae = random_vae(ratios)

    def choose(convolution: Any) -> Any:
        return fused.Tiling(rows=32, columns=convolution.outputs, depth=16, tma=tma)

    latents = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    found = fused.FusedDecoder(vae.decoder, choose)(latents)
    expected = vae.decoder(latents.transpose(1, 2))
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.parametrize(
    ("hip", "capability", "compiled", "expected"),
    [
        (None, (9, 0), None, True),
        (None, (9, 0), False, False),
        (None, (8, 9), None, False),
        ("6.4", (9, 0), None, False),
    ],
    ids=["Hopper", "compilation off", "Ada", "AMD's MI200"],
)
def test_fused_kernels_are_for_hopper_cards_alone(
    monkeypatch: pytest.MonkeyPatch,
    hip: str | None,
    capability: tuple[int, int],
    compiled: bool | None,  # noqa: FBT001 - a parameter of the table
    expected: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    card = DeviceReport(device="cuda:0", name="a card", vram_gb=80)
    settings = EngineSettings(compile=compiled)
    assert acceleration_for(card, settings, Offload()).fused is expected


def test_widths_without_kernels_and_weight_norm_are_told_apart(fused: Any) -> None:
    assert fused.fits(random_vae([2, 4]).decoder)
    narrow = random_vae([2, 4], channels=8)
    assert not fused.fits(narrow.decoder)
    with pytest.raises(ValueError, match="powers of two"):
        fused.FusedDecoder(narrow.decoder)


def test_kernels_that_fail_or_are_wrong_give_way_to_the_plain_decoder_with_one_warning(
    fused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = random_vae([2, 4])
    song = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    expected = vae.decode(song.T.unsqueeze(0)).sample[0]

    def failing(_: Any) -> None:
        raise RuntimeError("PTX assembly aborted")

    def silent(_: Any, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 2, 8 * latents.shape[1])

    def nothing(_: Any) -> None:
        return None

    for compiling, running, said in ((failing, silent, "they failed"), (nothing, silent, "they are wrong")):
        monkeypatch.setattr(fused.FusedDecoder, "compile_kernels", compiling)
        monkeypatch.setattr(fused.FusedDecoder, "forward", running)
        decoder = TileDecoder(vae, fused=True)
        assert not decoder.decode([song])[0].any()
        with capture_logs() as logs:
            assert list(decoder.warm_up()) == ["the VAE decoder's fused kernels"]
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert said in logs[0]["event"]
        assert (decoder.decode([song])[0] - expected).abs().max() < 1e-5
