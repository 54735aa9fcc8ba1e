# SPDX-License-Identifier: Apache-2.0
"""Flow edit: turns a source into a song by the difference between the velocities under its texts and under the song's.

At each step the source is noised, and the song so far with the same noise; the song moves along the difference of the
two velocities. Nothing is inverted, and what both texts agree on stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from acestep_consumer.engine.renderer.denoising.guidance import Guidance, VelocityFilter
from acestep_consumer.engine.renderer.denoising.pack import on_device
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch, Condition


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowEditRequest:
    """Parameters of a flow edit: the source's texts, the part of the steps, and noises a step."""

    caption: str
    lyrics: str
    start: float = 0.0
    end: float = 1.0
    averages: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The source or the song: its texts, and guidance and filter of its velocities."""

    condition: Condition
    guidance: Guidance | None
    velocity_filter: VelocityFilter

    def conditions(self) -> tuple[Condition, ...]:
        """Return its condition, and the empty one where it is guided."""
        return (self.condition,) if self.guidance is None else (self.condition, self.guidance.null)

    def velocity(self, velocities: Sequence[torch.Tensor], latents: torch.Tensor, time: float) -> torch.Tensor:
        """Combine the velocities of its branches."""
        velocity, *unconditional = velocities
        if self.guidance is not None and unconditional:
            velocity = self.guidance.guide(velocity, unconditional[0], latents, time)
        return self.velocity_filter.apply(velocity, latents)


@dataclass(slots=True, eq=False)
class FlowEdit:
    """The edited steps of one song: ``first`` up to ``end`` (not included), from 0.

    Attributes:
        source: latents of the source, [frames, channels].
        context: source latents and chunk mask that the model sees, [frames, 2 * channels].
        source_condition: the source's texts and timbre.
        condition: the song's.
        generator: draws a noise for each average of each step.
        guidance: the song's; the source gets one of its own.
        velocity_filter: likewise.
        averages: noises a step, whose velocities are averaged.
    """

    source: torch.Tensor
    context: torch.Tensor
    source_condition: Condition
    condition: Condition
    generator: torch.Generator
    guidance: Guidance | None
    velocity_filter: VelocityFilter
    first: int
    end: int
    averages: int = 1
    edited: torch.Tensor = field(init=False)
    _sides: tuple[_Side, _Side] = field(init=False)
    _branches: tuple[Branch, ...] = ()
    _differences: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.edited = self.source
        own = self.guidance.fresh() if self.guidance else None
        self._sides = (
            _Side(self.source_condition, own, self.velocity_filter.fresh()),
            _Side(self.condition, self.guidance, self.velocity_filter),
        )

    def covers(self, step: int) -> bool:
        """Whether this step is one of the edit."""
        return self.first <= step < self.end

    def branches(self, time: float, *, guided: bool) -> tuple[Branch, ...]:
        """Return the branches of the next pass: the source's and the song's, each with the empty one if guided."""
        if not self._branches:
            noised = self._noised(time)
            self._branches = tuple(
                Branch(condition, self.context, latents)
                for side, latents in zip(self._sides, (noised, self.edited + noised - self.source), strict=True)
                for condition in side.conditions()[: 2 if guided else 1]
            )
        return self._branches

    def advance(self, velocities: Sequence[torch.Tensor], time: float, reached: float) -> bool:
        """Go on by one pass, given the velocities of ``branches``; whether that was the last one of its step."""
        half = len(velocities) // 2
        source, song = (
            side.velocity(velocities[first : first + half], self._branches[first].latents, time)
            for side, first in zip(self._sides, (0, half), strict=True)
        )
        self._branches = ()
        self._differences.append(song - source)
        if len(self._differences) < self.averages:
            return False
        mean = torch.stack(self._differences).mean(0)
        self._differences.clear()
        self.edited = torch.add(self.edited, mean, alpha=reached - time)
        return True

    def latents(self, time: float) -> torch.Tensor:
        """Return the song so far, noised for ``time`` as the source is: where plain denoising goes on from."""
        return self.edited if time == 0 else self.edited + self._noised(time) - self.source

    def _noised(self, time: float) -> torch.Tensor:
        """Return the source with fresh noise."""
        shape, device = (1, *self.source.shape), self.generator.device
        noise = torch.randn(shape, generator=self.generator, device=device, dtype=self.source.dtype)[0]
        return (1.0 - time) * self.source + time * on_device(noise, self.source.device)
