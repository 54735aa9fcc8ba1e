# SPDX-License-Identifier: Apache-2.0
"""The DiT forward pass of a denoising step, for any samples that use the same weights.

The layout of a batch is kept for as long as the same samples step together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from acestep_consumer.engine.renderer.cuda_graphs import GraphedFlow
from acestep_consumer.engine.renderer.pack import Pack
from acestep_consumer.engine.renderer.packed_dit import Condition, PackedDit
from acestep_consumer.engine.renderer.sample import Sample


@dataclass(frozen=True, slots=True, eq=False)
class _PackMembers:
    """The samples of a pack, and the conditions (one per branch) of each at this step."""

    samples: tuple[Sample, ...]
    branches: tuple[tuple[Condition, ...], ...]

    def same_as(self, other: "_PackMembers | None") -> bool:
        """Whether these are the same samples with the same branches, compared by identity."""
        return other is not None and self.identities() == other.identities()

    def conditions(self) -> list[Condition]:
        """Return the condition of every branch."""
        return [condition for branches in self.branches for condition in branches]

    def per_branch(self) -> Iterator[Sample]:
        """Yield each sample once for each of its branches."""
        for sample, branches in zip(self.samples, self.branches, strict=True):
            for _ in branches:
                yield sample

    def identities(self) -> list[int]:
        """Return the ids of all samples and conditions, in order."""
        samples = zip(self.samples, self.branches, strict=True)
        return [id(member) for sample, branches in samples for member in (sample, *branches)]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of one pack, used for all steps that have the same members."""

    members: _PackMembers
    pack: Pack
    flow: GraphedFlow


class Denoiser:
    """Predicts velocities with one DiT.

    Args:
        dit: the DiT.
        graphed: replay small packs as one CUDA graph; for CUDA devices only.
    """

    def __init__(self, dit: PackedDit, *, graphed: bool = False) -> None:
        self.dit = dit
        self._graphed = graphed
        self._layout: _Layout | None = None

    def velocities(self, samples: Sequence[Sample]) -> list[Sequence[torch.Tensor]]:
        """Return the velocities that each sample's next step needs: [frames, channels] for each of its branches.

        They are overwritten by the next call.
        """
        members = _PackMembers(tuple(samples), tuple(sample.branches() for sample in samples))
        layout = self._layout
        if layout is None or not members.same_as(layout.members):
            layout = self._prepare(members)
        latents = layout.pack.join([sample.latents for sample in members.per_branch()])
        velocities = layout.pack.split(layout.flow(latents, self._times(members)))
        ends = list(accumulate(len(branches) for branches in members.branches))
        return [velocities[end - len(branches) : end] for branches, end in zip(members.branches, ends, strict=True)]

    def reset(self) -> None:
        """Free the layout of the last pack and its CUDA graph; the next pack makes its own."""
        self._layout = None

    def _prepare(self, members: _PackMembers) -> "_Layout":
        self.reset()
        conditions = members.conditions()
        pack = self.dit.lay_out([sample.frames for sample in members.per_branch()], conditions)
        context = pack.join([sample.context for sample in members.per_branch()])
        kv = torch.cat([condition.kv for condition in conditions], dim=2)
        flow = GraphedFlow(self.dit, pack, context, kv, graphed=self._graphed)
        self._layout = _Layout(members, pack, flow)
        return self._layout

    def _times(self, members: _PackMembers) -> torch.Tensor:
        """Return the flow time of each branch, and one for the empty branch at the end of the pack."""
        times = [sample.time for sample in members.per_branch()]
        return torch.tensor([*times, 0.0], dtype=self.dit.dtype).to(self.dit.device, non_blocking=True)
