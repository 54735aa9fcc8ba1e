# SPDX-License-Identifier: Apache-2.0
"""One song while it is denoised: its latents, what steers it, and the arithmetic of a step.

A step is one forward pass, or two where the sampler is Heun's. Everything that a request may ask of the sampler is
done here for one song alone: songs of a batch share forward passes and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from acestep_consumer.engine.renderer.denoising.dcw import Dcw
from acestep_consumer.engine.renderer.denoising.flow_edit import FlowEdit
from acestep_consumer.engine.renderer.denoising.guidance import Guidance, VelocityFilter
from acestep_consumer.engine.renderer.denoising.pack import on_device
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch, Condition
from acestep_consumer.engine.renderer.latents import FinalLatents
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import AlignmentRequest
from acestep_consumer.engine.renderer.output import MINUS_1_DB
from acestep_consumer.engine.renderer.window import KeptLatents


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerOptions:
    """Options of a song's sampler.

    Attributes:
        method: ``ode`` is deterministic, ``sde`` adds noise at each step.
        heun: Heun's method, of two forward passes a step, in place of Euler's; for ``ode``.
        heun_last_step: whether the last step has its second pass too.
        velocity_limit: see ``VelocityFilter``.
        velocity_smoothing: see ``VelocityFilter``.
        dcw: the wavelet correction; None: none.
        rescale: what the final latents are multiplied by.
        offset: what is added to them after that.
    """

    method: Literal["ode", "sde"] = "ode"
    heun: bool = False
    heun_last_step: bool = False
    velocity_limit: float = 0.0
    velocity_smoothing: float = 0.0
    dcw: Dcw | None = None
    rescale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class TextSwitch:
    """``audio_cover_strength`` below 1: from step ``step`` on, the text alone steers the song, and no source."""

    step: int
    condition: Condition
    context: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Prediction:
    """A Heun step between its two passes: the latents that the first pass leads to, and its velocity."""

    latents: torch.Tensor
    velocity: torch.Tensor


@dataclass(slots=True, eq=False)
class Sample:
    """One song.

    Attributes:
        latents: [frames, channels].
        context: source latents and chunk mask, [frames, 2 * channels].
        condition: its texts and timbre.
        times: flow time before each step, 1 (noise) to 0, and last the time after all of them.
        generator: draws the noise of the SDE sampler.
        options: how it is sampled.
        guidance: classifier-free guidance; None: none.
        velocity_filter: limit and smoothing of its velocities.
        switch: where the text alone takes over; None: nowhere.
        edit: the steps that turn its source into the song (flow edit); None: none.
        kept: the source latents around the window of a repaint or lego.
        heard_frames: the frames that are asked for, where the model works on more.
        peak: what the audio's peak is scaled to on the device; None: no scaling.
        alignment: the lyrics that it is aligned with when it is denoised; None: none.
        level: what its decoded samples are multiplied by before their peak is looked at.
        gain: what its decoded samples were multiplied by, once they are.
    """

    latents: torch.Tensor
    context: torch.Tensor
    condition: Condition
    times: tuple[float, ...]
    generator: torch.Generator
    options: SamplerOptions = field(default_factory=SamplerOptions)
    guidance: Guidance | None = None
    switch: TextSwitch | None = None
    edit: FlowEdit | None = None
    kept: KeptLatents | None = None
    heard_frames: int | None = None
    peak: float | None = MINUS_1_DB
    alignment: AlignmentRequest | None = None
    level: float = 1.0
    gain: torch.Tensor | None = None
    step: int = 0
    velocity_filter: VelocityFilter = field(default_factory=VelocityFilter)
    _predicted: _Prediction | None = None

    @property
    def frames(self) -> int:
        """Length in latent frames."""
        return self.latents.shape[0]

    @property
    def final_latents(self) -> FinalLatents | None:
        """The latents that were decoded, as far as they are heard; None before that."""
        if self.gain is None:
            return None
        return FinalLatents(self.latents[: self.heard_frames].to(torch.float16), self.gain)

    @property
    def steps(self) -> int:
        """Denoising steps in all."""
        return len(self.times) - 1

    @property
    def time(self) -> float:
        """Flow time of the next forward pass."""
        return self.times[self.step if self._predicted is None else self.step + 1]

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.step == self.steps

    def start_edit(self, edit: FlowEdit) -> None:
        """Begin with the steps of a flow edit; those before them are left out."""
        self.edit, self.step = edit, edit.first
        if not edit.covers(self.step):
            self._leave_edit(edit)

    def branches(self) -> tuple[Branch, ...]:
        """Return the branches of the next forward pass: the sample's own, and the empty one where it is guided."""
        if self.edit is not None and self.edit.covers(self.step):
            return self.edit.branches(self.time, guided=self._active_guidance() is not None)
        latents = self.latents if self._predicted is None else self._predicted.latents
        condition, context = self.condition, self.context
        if self.switch is not None and self.step >= self.switch.step:
            condition, context = self.switch.condition, self.switch.context
        own = Branch(condition, context, latents)
        guidance = self._active_guidance()
        return (own,) if guidance is None else (own, Branch(guidance.null, context, latents))

    def advance(self, velocities: Sequence[torch.Tensor]) -> None:
        """Go on by one forward pass, given the velocities of ``branches``, [frames, channels] each."""
        if self.edit is not None and self.edit.covers(self.step):
            self._edit(self.edit, velocities)
        elif self._predicted is not None:
            self._correct(self._predicted, velocities)
        else:
            self._denoise(velocities)

    def _edit(self, edit: FlowEdit, velocities: Sequence[torch.Tensor]) -> None:
        if edit.advance(velocities, self.time, self.times[self.step + 1]):
            self.step += 1
            if not edit.covers(self.step):
                self._leave_edit(edit)

    def _leave_edit(self, edit: FlowEdit) -> None:
        self.latents = edit.latents(self.time)
        self._finish_if_done()

    def _denoise(self, velocities: Sequence[torch.Tensor]) -> None:
        """Take an Euler step, or the first half of a Heun step."""
        time, reached = self.time, self.times[self.step + 1]
        velocity = self.velocity_filter.apply(self._guided(velocities, time), self.latents)
        if self.options.method == "sde":
            latents = self._renoised(velocity, time, reached)
        else:
            latents = torch.add(self.latents, velocity, alpha=reached - time)
            if self.options.heun and (reached > 0 or self.options.heun_last_step):
                self._predicted = _Prediction(latents, velocity.clone())
                return
        self._arrive(latents, velocity)

    def _correct(self, predicted: _Prediction, velocities: Sequence[torch.Tensor]) -> None:
        """Take the second half of a Heun step: along the mean of the velocities at both its ends."""
        velocity, *unconditional = velocities
        if self.guidance is not None and unconditional:
            velocity = self.guidance.correct(velocity, unconditional[0], predicted.latents, self.time)
        mean = self.velocity_filter.mean(velocity, predicted.latents, predicted.velocity)
        self._predicted = None
        latents = torch.add(self.latents, mean, alpha=self.times[self.step + 1] - self.time)
        self._arrive(latents, predicted.velocity)

    def _arrive(self, latents: torch.Tensor, velocity: torch.Tensor) -> None:
        """Set the latents at the end of a step, whose first velocity was this one."""
        if self.options.dcw is not None:
            song = torch.add(self.latents, velocity, alpha=-self.time)
            latents = self.options.dcw.corrected(latents, song, self.time)
        if self.kept is not None:
            latents = self.kept.after_step(latents, self.step, self.steps, self.times[self.step + 1])
        self.latents = latents
        self.step += 1
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self.done and (self.options.rescale, self.options.offset) != (1.0, 0.0):
            self.latents = self.latents * self.options.rescale + self.options.offset

    def _guided(self, velocities: Sequence[torch.Tensor], time: float) -> torch.Tensor:
        velocity, *unconditional = velocities
        if self.guidance is None or not unconditional:
            return velocity
        return self.guidance.guide(velocity, unconditional[0], self.latents, time)

    def _renoised(self, velocity: torch.Tensor, time: float, reached: float) -> torch.Tensor:
        """Return the predicted song with fresh noise for the time that the step has ``reached``."""
        song = torch.add(self.latents, velocity, alpha=-time)
        shape, generator = (1, *song.shape), self.generator
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=song.dtype)[0]
        return reached * on_device(noise, song.device) + (1.0 - reached) * song

    def _active_guidance(self) -> Guidance | None:
        return self.guidance if self.guidance and self.guidance.applies(self.time) else None


def mixed_noise(own: torch.Tensor, other: torch.Tensor, variance: float) -> torch.Tensor:
    """Return noise of the same strength between two noises: ``variance`` 0 is ``own``, 1 is ``other``."""
    angle = variance * math.pi / 2
    return math.cos(angle) * own + math.sin(angle) * other
