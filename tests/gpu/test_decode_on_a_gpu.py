# SPDX-License-Identifier: Apache-2.0
"""The VAE decode as a GPU runs it: bfloat16, compiled. Run by hand: ``pytest -m gpu tests/gpu``."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck

from acestep_consumer.engine.renderer.decoder.vae_decode import TileDecoder
from acestep_consumer.engine.renderer.output import normalised
from acestep_consumer.engine.renderer.quiet_imports import quietly

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm card"),
    # torch's compiler uses what torch has deprecated, and warns of matrix products that could be faster.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def vae() -> Any:
    """The blocks and strides of the real one, an eighth as wide, in float32 on the card."""
    return made_vae(decoder_channels=16)


def made_vae(decoder_channels: int) -> Any:
    with torch.random.fork_rng(), quietly():
        torch.manual_seed(3)
        made = AutoencoderOobleck(
            encoder_hidden_size=16,
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=[1, 2, 4, 8, 16],
            decoder_channels=decoder_channels,
            decoder_input_channels=64,
            sampling_rate=48_000,
        )
    for module in made.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)
    return made.eval().requires_grad_(requires_grad=False).to("cuda")


def rounding(audio: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """How far a sound is from the float32 one: at worst, and on the whole."""
    difference = audio.float() - exact
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def test_compiled_bfloat16_is_as_near_to_float32_as_plain_diffusers(vae: Any) -> None:
    half = copy.deepcopy(vae).to(torch.bfloat16)
    decoder = TileDecoder(half, compiled=True)
    assert len(list(decoder.warm_up())) == 2
    songs = [torch.randn(frames, 64, device="cuda").to(torch.bfloat16) for frames in (1, 60, 250, 750, 3_000)]
    with torch.compiler.set_stance("fail_on_recompile"):
        decoded_songs = decoder.decode(songs)
    for song, ours in zip(songs, decoded_songs, strict=True):
        theirs = half.decode(song.T.unsqueeze(0)).sample[0]
        exact = vae.decode(song.float().T.unsqueeze(0)).sample[0]
        assert ours.shape == theirs.shape == (2, len(song) * 1_920)
        assert ours.dtype == torch.float32
        (worst, typical), (worst_of_theirs, typical_of_theirs) = rounding(ours, exact), rounding(theirs, exact)
        assert worst < 2 * worst_of_theirs
        assert typical < 1.25 * typical_of_theirs


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernels are for Hopper"
)
@pytest.mark.parametrize("decoder_channels", [128, 16], ids=["as wide as the real one", "narrow"])
def test_fused_kernels_are_as_near_to_float32_as_plain_diffusers(decoder_channels: int) -> None:
    vae = made_vae(decoder_channels)
    for name, parameter in vae.decoder.named_parameters():
        if name.rpartition(".")[2] in ("alpha", "beta"):
            torch.nn.init.normal_(parameter, std=0.3)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    exact_half = copy.deepcopy(half).float()
    decoder = TileDecoder(half, compiled=True, fused=True)
    assert list(decoder.warm_up()) == ["the VAE decoder's fused kernels"]
    assert decoder._fused
    songs = [torch.randn(frames, 64, device="cuda").to(torch.bfloat16) for frames in (1, 60, 250, 750)]
    for song, ours, alone in zip(songs, decoder.decode(songs), [decoder.decode([s])[0] for s in songs], strict=True):
        assert torch.equal(ours, alone)
        theirs = half.decode(song.T.unsqueeze(0)).sample[0]
        exact = exact_half.decode(song.float().T.unsqueeze(0)).sample[0]
        (worst, typical), (worst_of_theirs, typical_of_theirs) = rounding(ours, exact), rounding(theirs, exact)
        assert worst < 1.1 * worst_of_theirs
        assert typical < 1.1 * typical_of_theirs


def test_decoding_and_normalising_do_not_wait_for_the_device(vae: Any) -> None:
    decoder = TileDecoder(vae)
    songs = [torch.randn(frames, 64, device="cuda") for frames in (60, 750)]
    decoder.decode(songs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        levelled = [normalised(audio) for audio in decoder.decode(songs)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(abs(audio.abs().max().item() - 10 ** (-1 / 20)) < 1e-5 for audio in levelled)
