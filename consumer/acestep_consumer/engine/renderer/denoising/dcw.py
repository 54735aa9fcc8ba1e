# SPDX-License-Identifier: Apache-2.0
"""DCW: after each denoising step a song's latents are corrected in two bands of a wavelet transform along its frames.

The correction is the difference between the latents and the song that is predicted at the step, weighted by band: early
steps correct the low band, late steps the high one. Transform and inverse are linear and undo each other, so that only
the difference is transformed.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

DcwMode = Literal["double", "low", "high", "pix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dcw:
    """Settings of the correction.

    Attributes:
        mode: the corrected bands; ``pix``: the latents as they are.
        scale: strength, of the low band in mode ``double``.
        high_scale: strength of the high band in mode ``double``.
        wavelet: its name in PyWavelets.
    """

    mode: DcwMode = "double"
    scale: float = 0.05
    high_scale: float = 0.02
    wavelet: str = "haar"

    def corrected(self, latents: torch.Tensor, predicted: torch.Tensor, time: float) -> torch.Tensor:
        """Return the latents after a step that began at ``time``; ``predicted``: the song predicted there.

        All are [frames, channels].
        """
        difference = latents.float() - predicted.float()
        if self.mode == "pix":
            return (latents + self.scale * difference).to(latents.dtype)
        low, high = {
            "double": (time * self.scale, (1.0 - time) * self.high_scale),
            "low": (time * self.scale, 0.0),
            "high": (0.0, (1.0 - time) * self.scale),
        }[self.mode]
        if low == high == 0:
            return latents
        return (latents + _weighted(difference, self.wavelet, low, high)).to(latents.dtype)


def _weighted(signal: torch.Tensor, wavelet: str, low: float, high: float) -> torch.Tensor:
    """Return [frames, channels] with its two bands multiplied by ``low`` and ``high``.

    Filters of length L: each pair of neighbouring frames adds L values to the result, which overlap.
    """
    bands = _filters(wavelet, signal.device)
    filters = low * bands[0] + high * bands[1]
    length, frames = len(filters), signal.shape[0]
    # Zeros beyond both ends; an odd length gets one more.
    padded = torch.nn.functional.pad(signal, (0, 0, length - 2, length - 2 + frames % 2))
    windows = padded.unfold(0, length, 2) @ filters
    if length == 2:  # no overlap  # noqa: PLR2004 - the shortest wavelet
        return windows.transpose(1, 2).reshape(-1, signal.shape[1])[:frames]
    pairs = len(windows)
    summed = signal.new_zeros(pairs + length // 2 - 1, 2, signal.shape[1])
    for offset in range(length // 2):
        summed[offset : offset + pairs] += windows[:, :, 2 * offset : 2 * offset + 2].transpose(1, 2)
    return summed.flatten(0, 1)[length - 2 : length - 2 + frames]


@cache
def _filters(wavelet: str, device: torch.device) -> torch.Tensor:
    """Return, for the low and for the high band, analysis times synthesis: [2, L, L]."""
    if wavelet == "haar":
        return torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.5, -0.5], [-0.5, 0.5]]], device=device)
    import pywt  # noqa: PLC0415 - only for songs that name another wavelet

    bank = pywt.Wavelet(wavelet)
    pairs = ((bank.dec_lo, bank.rec_lo), (bank.dec_hi, bank.rec_hi))
    found = [torch.outer(torch.tensor(analysis).flip(0), torch.tensor(synthesis)) for analysis, synthesis in pairs]
    return torch.stack(found).to(device)
