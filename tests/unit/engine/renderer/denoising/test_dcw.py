# SPDX-License-Identifier: Apache-2.0
"""DCW against a plain forward and inverse wavelet transform."""

import numpy as np
import pytest
import pywt
import torch

from acestep_consumer.engine.renderer.denoising.dcw import Dcw
from acestep_schemas.request import GenerationRequest

FRAMES = [1, 2, 3, 8, 25, 60]
TIME = 0.7


def by_transform(latents: torch.Tensor, predicted: torch.Tensor, wavelet: str, low: float, high: float) -> torch.Tensor:
    """The correction as it is defined: both are transformed, the bands moved apart, and the result transformed back."""
    odd = latents.shape[0] % 2
    bands = [
        pywt.dwt(np.pad(part.numpy(), ((0, odd), (0, 0))), wavelet, "zero", axis=0) for part in (latents, predicted)
    ]
    (ours_low, ours_high), (other_low, other_high) = bands
    moved = ours_low + low * (ours_low - other_low), ours_high + high * (ours_high - other_high)
    return torch.from_numpy(pywt.idwt(*moved, wavelet, "zero", axis=0)[: len(latents)])


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym5", "coif2", "bior2.2", "rbio3.1"])
@pytest.mark.parametrize(
    ("dcw", "low", "high"),
    [
        (Dcw(scale=0.3, high_scale=0.2), TIME * 0.3, (1 - TIME) * 0.2),
        (Dcw(mode="low", scale=0.3), TIME * 0.3, 0.0),
        (Dcw(mode="high", scale=0.3), 0.0, (1 - TIME) * 0.3),
    ],
    ids=["double", "low", "high"],
)
def test_both_bands_are_moved_by_their_share_of_the_difference(
    dcw: Dcw, low: float, high: float, wavelet: str, frames: int
) -> None:
    generator = torch.Generator().manual_seed(frames)
    latents, predicted = (torch.randn(frames, 3, generator=generator) for _ in range(2))
    named = Dcw(mode=dcw.mode, scale=dcw.scale, high_scale=dcw.high_scale, wavelet=wavelet)
    expected = by_transform(latents, predicted, wavelet, low, high)
    torch.testing.assert_close(named.corrected(latents, predicted, TIME), expected, rtol=0, atol=1e-5)


def test_the_mode_pix_moves_the_latents_themselves() -> None:
    latents, predicted = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    assert Dcw(mode="pix", scale=0.5).corrected(latents, predicted, TIME).item() == 0.0


def test_nothing_is_done_where_both_shares_are_zero() -> None:
    latents = torch.randn(4, 2)
    assert Dcw(scale=0, high_scale=0).corrected(latents, torch.zeros(4, 2), TIME) is latents


def test_half_precision_stays_half_precision() -> None:
    latents = torch.randn(8, 2).bfloat16()
    assert Dcw().corrected(latents, torch.zeros(8, 2).bfloat16(), TIME).dtype is torch.bfloat16


def test_every_discrete_wavelet_may_be_named() -> None:
    for wavelet in pywt.wavelist(kind="discrete"):
        assert GenerationRequest(dcw_wavelet=wavelet).dcw_wavelet == wavelet
