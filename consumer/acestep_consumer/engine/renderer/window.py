# SPDX-License-Identifier: Apache-2.0
"""Windows of repaint and lego: the source around a part that is made anew is kept, as in ACE-Step.

It is kept in three places: latents outside the window are reset to the noised source after the first denoising steps;
the final latents are cross-faded with those of the source; and outside the window the samples are the source's own.
"""

from dataclasses import dataclass
from typing import Literal

import torch

RepaintMode = Literal["conservative", "balanced", "aggressive"]

_LATENT_FRAMES, _SAMPLES_S = 25, 0.05  # cross-fades where all is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """Rules that keep the source around a window.

    Attributes:
        ratio: part of the denoising steps after which the latents outside are reset to the noised source.
        latent_frames: length of the final latents' cross-fade on each side of the window; 0: none.
        samples_s: length of the samples' cross-fade in seconds; None: the samples are not the source's.
        last_step: whether the latents are reset after the last step too, where ``ratio`` reaches it.
    """

    ratio: float = 0.0
    latent_frames: int = 0
    samples_s: float | None = None
    last_step: bool = True


def keep_rules(
    mode: RepaintMode,
    strength: float,
    *,
    last_step: bool,
    latent_frames: int | None = None,
    samples_s: float | None = None,
) -> KeepRules:
    """Return the rules of a mode; ``strength`` counts for ``balanced``. Named cross-fades take the place of its own."""
    kept = {"conservative": 1.0, "balanced": 1.0 - strength, "aggressive": 0.0}[mode]
    own_samples_s = None if mode == "aggressive" else _SAMPLES_S * kept
    return KeepRules(
        ratio=kept,
        latent_frames=round(_LATENT_FRAMES * kept) if latent_frames is None else latent_frames,
        samples_s=own_samples_s if samples_s is None else samples_s,
        last_step=last_step,
    )


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a song that is made anew, ``start`` to ``end``, of ``length`` in all; in frames or in samples."""

    start: int
    end: int
    length: int

    @classmethod
    def of(cls, start_s: float | None, end_s: float | None, rate: float, length: int) -> "Window":
        """Return the window between two times; at least one frame. None is the start, and the end, of the song."""
        start = max(0, min(int((start_s or 0.0) * rate), length - 1))
        end = length if end_s is None else int(end_s * rate)
        return cls(start, max(start + 1, min(end, length)), length)

    @property
    def whole(self) -> bool:
        """Whether it is the whole song."""
        return (self.start, self.end) == (0, self.length)

    def mask(self, device: torch.device | str = "cpu", fade: int = 0) -> torch.Tensor:
        """Return the weight of the new part, [length]: 1 inside, 0 outside, with ramps of ``fade`` before and after."""
        mask = torch.zeros(self.length, device=device)
        mask[self.start : self.end] = 1.0
        before, after = min(fade, self.start), min(fade, self.length - self.end)
        mask[self.start - before : self.start] = _ramp(before, device)
        mask[self.end : self.end + after] = _ramp(after, device).flip(0)
        return mask


def _ramp(length: int, device: torch.device | str) -> torch.Tensor:
    """Return values that rise between 0 and 1, both excluded."""
    return torch.linspace(0.0, 1.0, length + 2, device=device)[1:-1]


@dataclass(frozen=True, slots=True, eq=False)
class KeptLatents:
    """One song's source latents while the part in ``window`` is denoised.

    ``source`` and ``noise``: [frames, channels], the song's source and its first noise.
    """

    window: Window
    rules: KeepRules
    source: torch.Tensor
    noise: torch.Tensor

    def after_step(self, latents: torch.Tensor, step: int, steps: int, time: float) -> torch.Tensor:
        """Return the latents after step ``step`` (from 0) of ``steps``; ``time`` is the flow time it has reached."""
        last = step == steps - 1
        if step < round(self.rules.ratio * steps) and (self.rules.last_step or not last):
            noised = time * self.noise + (1.0 - time) * self.source
            latents = torch.cat([noised[: self.window.start], self._inside(latents), noised[self.window.end :]])
        return self._blended(latents) if last else latents

    def _inside(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[self.window.start : self.window.end]

    def _blended(self, latents: torch.Tensor) -> torch.Tensor:
        if self.rules.latent_frames <= 0:
            return latents
        mask = self.window.mask(latents.device, self.rules.latent_frames)[:, None].to(latents.dtype)
        return mask * latents + (1.0 - mask) * self.source
