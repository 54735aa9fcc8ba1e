# SPDX-License-Identifier: Apache-2.0
"""A song on its way from noise to latents: what it is made of, how far it is, and its next step.

The arithmetic of a step is that of ``AceStepPipeline``: its guidance (APG, with a momentum of the song's own), its
guidance interval, its blend of a cover with the text alone, and diffusers' scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from acestep_consumer.engine.renderer.packed_dit import Condition
from acestep_consumer.engine.renderer.rng import SongScheduler

# As ACE-Step's base and SFT models were sampled by their authors.
_MOMENTUM, _NORM_THRESHOLD = -0.75, 2.5


@dataclass(slots=True, eq=False)
class Guidance:
    """Classifier-free guidance of one song (APG): ``null`` is the empty condition, ``interval`` in parts of the way."""

    scale: float
    interval: tuple[float, float]
    null: Condition
    momentum: MomentumBuffer = field(default_factory=lambda: MomentumBuffer(momentum=_MOMENTUM))

    def applies(self, time: float) -> bool:
        """Whether this flow time, 1 to 0, lies in the interval."""
        start, end = self.interval
        return start <= 1.0 - time <= end

    def guide(self, conditioned: torch.Tensor, unconditioned: torch.Tensor) -> torch.Tensor:
        """Combine two velocities, [frames, channels] each."""
        guided: torch.Tensor = normalized_guidance(
            conditioned[None],
            unconditioned[None],
            guidance_scale=self.scale - 1.0,
            momentum_buffer=self.momentum,
            eta=0.0,
            norm_threshold=_NORM_THRESHOLD,
            use_original_formulation=True,
            norm_dim=(1,),
        )
        return guided[0]


@dataclass(frozen=True, slots=True, eq=False)
class CoverBlend:
    """A cover's pull towards its text alone: velocities are mixed, ``strength`` parts cover."""

    strength: float
    plain: Condition

    def mix(self, cover: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Combine two velocities, [frames, channels] each."""
        return self.strength * cover + (1.0 - self.strength) * plain


@dataclass(slots=True, eq=False)
class Sample:
    """One song. ``latents``: [frames, channels]; ``context``: source latents and chunk mask, [frames, 2 * channels]."""

    latents: torch.Tensor
    context: torch.Tensor
    condition: Condition
    scheduler: SongScheduler
    guidance: Guidance | None = None
    blend: CoverBlend | None = None
    step: int = 0

    @property
    def frames(self) -> int:
        """Length in latent frames."""
        return self.latents.shape[0]

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.scheduler.timesteps)

    @property
    def time(self) -> float:
        """Flow time of the next step, 1 (noise) to 0."""
        return float(self.scheduler.timesteps[self.step])

    @property
    def done(self) -> bool:
        """Whether the latents are finished."""
        return self.step == self.steps

    def voices(self) -> tuple[Condition, ...]:
        """Return the conditions under which the next step needs a velocity."""
        guidance = self._guidance_now()
        guided = (guidance.null,) if guidance else ()
        plain = (self.blend.plain,) if self.blend else ()
        return (self.condition, *guided, *plain)

    def advance(self, velocities: Sequence[torch.Tensor]) -> None:
        """Take one step along the velocities, [frames, channels] for each of ``voices``."""
        flow, *others = velocities
        if guidance := self._guidance_now():
            flow = guidance.guide(flow, others.pop(0))
        if self.blend is not None:
            flow = self.blend.mix(flow, others.pop(0))
        self.latents = self._stepped(flow)
        self.step += 1

    def _guidance_now(self) -> Guidance | None:
        return self.guidance if self.guidance and self.guidance.applies(self.time) else None

    def _stepped(self, flow: torch.Tensor) -> torch.Tensor:
        time = self.scheduler.timesteps[self.step]
        stepped: Any = self.scheduler.step(flow[None], time, self.latents[None], return_dict=False)[0]
        latents: torch.Tensor = stepped[0]
        return latents
