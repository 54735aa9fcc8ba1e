# SPDX-License-Identifier: Apache-2.0
"""One song while it is denoised: its latents, its conditions, and the arithmetic of a step.

A step is that of ``AceStepPipeline``: its guidance (APG, with a momentum of the sample's own), its guidance interval,
its blend of a cover with the text alone, and diffusers' noise scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from acestep_consumer.engine.renderer.output import MINUS_1_DB
from acestep_consumer.engine.renderer.packed_dit import Condition
from acestep_consumer.engine.renderer.rng import SeededScheduler
from acestep_consumer.engine.renderer.window import KeptLatents

# As ACE-Step's base and SFT models were sampled by their authors.
_MOMENTUM, _NORM_THRESHOLD = -0.75, 2.5


@dataclass(slots=True, eq=False)
class Guidance:
    """Classifier-free guidance of one sample (APG).

    ``null`` is the empty condition; ``interval`` is where guidance applies, as parts of the way from noise (0) to 1.
    """

    scale: float
    interval: tuple[float, float]
    null: Condition
    momentum: MomentumBuffer = field(default_factory=lambda: MomentumBuffer(momentum=_MOMENTUM))

    def applies(self, time: float) -> bool:
        """Whether this flow time, 1 to 0, lies in the interval."""
        start, end = self.interval
        return start <= 1.0 - time <= end

    def guide(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """Combine two velocities, [frames, channels] each."""
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


@dataclass(frozen=True, slots=True, eq=False)
class CoverBlend:
    """``audio_cover_strength`` below 1: a cover's velocity is mixed with that of its text alone."""

    strength: float
    text_only: Condition

    def mix(self, cover: torch.Tensor, text_only: torch.Tensor) -> torch.Tensor:
        """Combine two velocities, [frames, channels] each."""
        return self.strength * cover + (1.0 - self.strength) * text_only


@dataclass(slots=True, eq=False)
class Sample:
    """One song. ``latents``: [frames, channels]; ``context``: source latents and chunk mask, [frames, 2 * channels].

    ``kept``: the source latents around the window of a repaint or lego. ``heard_frames``: the frames that are asked
    for, where the model works on more. ``peak``: what the audio's peak is scaled to on the device; None: no scaling.
    """

    latents: torch.Tensor
    context: torch.Tensor
    condition: Condition
    noise_scheduler: SeededScheduler
    guidance: Guidance | None = None
    blend: CoverBlend | None = None
    kept: KeptLatents | None = None
    heard_frames: int | None = None
    peak: float | None = MINUS_1_DB
    step: int = 0

    @property
    def frames(self) -> int:
        """Length in latent frames."""
        return self.latents.shape[0]

    @property
    def steps(self) -> int:
        """Denoising steps in all."""
        return len(self.noise_scheduler.timesteps)

    @property
    def time(self) -> float:
        """Flow time of the next step, 1 (noise) to 0."""
        return float(self.noise_scheduler.timesteps[self.step])

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.step == self.steps

    def branches(self) -> tuple[Condition, ...]:
        """Return the condition of each branch of the next step: the sample's own, the empty one, the text alone."""
        guidance = self._active_guidance()
        guided = (guidance.null,) if guidance else ()
        text_only = (self.blend.text_only,) if self.blend else ()
        return (self.condition, *guided, *text_only)

    def advance(self, velocities: Sequence[torch.Tensor]) -> None:
        """Take one step along the velocities, [frames, channels] for each of ``branches``."""
        velocity, *others = velocities
        if guidance := self._active_guidance():
            velocity = guidance.guide(velocity, others.pop(0))
        if self.blend is not None:
            velocity = self.blend.mix(velocity, others.pop(0))
        self.latents = self._stepped(velocity)
        if self.kept is not None:
            reached = float(self.noise_scheduler.sigmas[self.step + 1])
            self.latents = self.kept.after_step(self.latents, self.step, self.steps, reached)
        self.step += 1

    def _active_guidance(self) -> Guidance | None:
        return self.guidance if self.guidance and self.guidance.applies(self.time) else None

    def _stepped(self, velocity: torch.Tensor) -> torch.Tensor:
        time = self.noise_scheduler.timesteps[self.step]
        stepped: Any = self.noise_scheduler.step(velocity[None], time, self.latents[None], return_dict=False)[0]
        latents: torch.Tensor = stepped[0]
        return latents
