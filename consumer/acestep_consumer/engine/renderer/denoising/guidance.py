# SPDX-License-Identifier: Apache-2.0
"""Guidance of one song: how the velocities with and without its condition become one.

ACE-Step's base and SFT models are sampled with APG (adaptive projected guidance), or with ADG (adaptive dual guidance,
by angles) where a request asks for it.
"""

from dataclasses import dataclass, field

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from acestep_consumer.engine.renderer.denoising.packed_dit import Condition

# As ACE-Step's base and SFT models were sampled by their authors.
_MOMENTUM, _NORM_THRESHOLD = -0.75, 2.5
_LARGEST_ANGLE = 3.14 / 6
_LEAST_WEIGHT = 1e-3
_LEAST_SINE = 1e-3


@dataclass(slots=True, eq=False)
class Guidance:
    """Classifier-free guidance of one sample, with a momentum of its own.

    ``null`` is the empty condition; ``interval`` are the flow times, 1 (noise) to 0, between which guidance applies;
    ``by_angle``: ADG in place of APG.
    """

    scale: float
    interval: tuple[float, float]
    null: Condition
    by_angle: bool = False
    momentum: MomentumBuffer = field(default_factory=lambda: MomentumBuffer(momentum=_MOMENTUM))

    def applies(self, time: float) -> bool:
        """Whether this flow time lies in the interval."""
        start, end = self.interval
        return start <= time <= end

    def guide(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, latents: torch.Tensor, time: float
    ) -> torch.Tensor:
        """Combine two velocities of ``latents`` at ``time``, all [frames, channels]."""
        if self.by_angle:
            return by_angle(conditional, unconditional, latents, time, self.scale)
        guided: torch.Tensor = normalized_guidance(
            conditional[None],
            unconditional[None],
            guidance_scale=self.scale - 1.0,
            momentum_buffer=self.momentum,
            eta=0.0,
            norm_threshold=_NORM_THRESHOLD,
            use_original_formulation=True,
            norm_dim=(1,),
        )
        return guided[0]

    def correct(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, latents: torch.Tensor, time: float
    ) -> torch.Tensor:
        """Combine the velocities of a Heun step's second pass: ADG, or guidance without projection and momentum.

        ADG has no result at time 0.
        """
        if self.by_angle and time > 0:
            return by_angle(conditional, unconditional, latents, time, self.scale)
        return unconditional + self.scale * (conditional - unconditional)

    def fresh(self) -> "Guidance":
        """Return the same guidance with a momentum of its own."""
        return Guidance(self.scale, self.interval, self.null, self.by_angle)


@dataclass(slots=True, eq=False)
class VelocityFilter:
    """Limit and smoothing of one sample's velocities.

    ``limit``: largest norm, as a multiple of the latents' norm, 0: none. ``smoothing``: weight of the velocity before.
    """

    limit: float = 0.0
    smoothing: float = 0.0
    last: torch.Tensor | None = None

    def apply(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return the velocity of ``latents``, both [frames, channels], within its limit and smoothed by the last."""
        velocity = self._smoothed(self.limited(velocity, latents), self.last)
        if self.smoothing:
            # A copy: velocities are overwritten by the next forward pass.
            self.last = velocity.clone()
        return velocity

    def mean(self, velocity: torch.Tensor, latents: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Return the velocity of a Heun step: the mean of its ``first`` and of its second, that of ``latents``.

        The second is smoothed by the first, and the next step by the mean.
        """
        second = self._smoothed(self.limited(velocity, latents), first)
        mean = (first + second) / 2
        if self.smoothing:
            self.last = mean
        return mean

    def _smoothed(self, velocity: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        return velocity if before is None or not self.smoothing else torch.lerp(velocity, before, self.smoothing)

    def limited(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return the velocity within its limit alone."""
        if not self.limit:
            return velocity
        ratio = self.limit * latents.float().norm() / velocity.float().norm().clamp(min=1e-12)
        within: torch.Tensor = velocity * ratio.clamp(max=1.0).to(velocity.dtype)
        return within

    def fresh(self) -> "VelocityFilter":
        """Return the same filter without a velocity before."""
        return VelocityFilter(self.limit, self.smoothing)


def by_angle(
    conditional: torch.Tensor, unconditional: torch.Tensor, latents: torch.Tensor, time: float, scale: float
) -> torch.Tensor:
    """Return the velocity of ADG: the predicted song is turned, frame by frame, away from the unguided one."""
    weight = max(scale - 1.0, 0.0) + _LEAST_WEIGHT
    a, b = (latents.double() - time * velocity.double() for velocity in (conditional, unconditional))
    cosine = (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True))
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    turned = (weight * angle).clamp(-_LARGEST_ANGLE, _LARGEST_ANGLE)
    away = a - b
    away = away - (away * b).sum(-1, keepdim=True) / (b * b).sum(-1, keepdim=True).clamp(min=1e-24) * b
    sine = torch.sin(angle)
    factor = torch.where(sine > _LEAST_SINE, torch.sin(turned) / sine.clamp(min=_LEAST_SINE), weight)
    predicted = torch.cos(turned) * a + away * factor
    return ((latents.double() - predicted) / time).to(conditional.dtype)
