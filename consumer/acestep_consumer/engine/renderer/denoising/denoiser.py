# SPDX-License-Identifier: Apache-2.0
"""The DiT forward pass of a denoising step, for any samples that use the same weights.

The layout of a batch is kept for as long as the same samples step together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from acestep_consumer.engine.renderer.denoising.cuda_graphs import Flow, StepGraphs
from acestep_consumer.engine.renderer.denoising.pack import Pack, on_device
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch, PackedDit
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.policy.memory_budget import StepGraphLimits


@dataclass(frozen=True, slots=True, eq=False)
class _PackMembers:
    """The samples of a pack, and the branches of each at this step."""

    samples: tuple[Sample, ...]
    branches: tuple[tuple[Branch, ...], ...]

    def same_as(self, other: "_PackMembers | None") -> bool:
        """Whether these are the same samples with the same conditions and contexts, compared by identity."""
        return other is not None and self.identities() == other.identities()

    def all_branches(self) -> list[Branch]:
        """Return the branches of all samples."""
        return [branch for branches in self.branches for branch in branches]

    def times(self) -> list[float]:
        """Return the flow time of each branch."""
        return [sample.time for sample, branches in zip(self.samples, self.branches, strict=True) for _ in branches]

    def identities(self) -> list[int]:
        """Return the ids of all samples, conditions and contexts, in order."""
        return [
            id(member)
            for sample, branches in zip(self.samples, self.branches, strict=True)
            for member in (sample, *(part for branch in branches for part in (branch.condition, branch.context)))
        ]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of one pack, used for all steps that have the same members."""

    members: _PackMembers
    pack: Pack
    flow: Flow


class Denoiser:
    """Predicts velocities with one DiT.

    Args:
        dit: the DiT.
        graphs: the largest packs that are stepped by a CUDA graph; for CUDA devices only, and weights that stay where
            they are. None: no pack is.
    """

    def __init__(self, dit: PackedDit, graphs: StepGraphLimits | None = None) -> None:
        self.dit = dit
        self._graphs = None if graphs is None else StepGraphs(dit, graphs)
        self._layout: _Layout | None = None

    @property
    def graph_bytes(self) -> int:
        """Device memory of what its CUDA graphs work on."""
        return 0 if self._graphs is None else self._graphs.bytes

    def velocities(self, samples: Sequence[Sample]) -> list[Sequence[torch.Tensor]]:
        """Return the velocities that each sample's next step needs: [frames, channels] for each of its branches.

        They are overwritten by the next call.
        """
        members = _PackMembers(tuple(samples), tuple(sample.branches() for sample in samples))
        layout = self._layout
        if layout is None or not members.same_as(layout.members):
            layout = self._prepare(members)
        latents = layout.pack.join([branch.latents for branch in members.all_branches()])
        velocities = layout.pack.split(layout.flow(latents, self._times(members)))
        ends = list(accumulate(len(branches) for branches in members.branches))
        return [velocities[end - len(branches) : end] for branches, end in zip(members.branches, ends, strict=True)]

    def forget_pack(self) -> None:
        """Free the layout of the last pack."""
        self._layout = None

    def reset(self) -> None:
        """Free the layout of the last pack and all CUDA graphs; they are made again when needed."""
        self.forget_pack()
        if self._graphs is not None:
            self._graphs.clear()

    def _prepare(self, members: _PackMembers) -> _Layout:
        self.forget_pack()  # its memory is free for the next one
        pack, flow = self.pack_and_flow(members.all_branches())
        self._layout = _Layout(members, pack, flow)
        return self._layout

    def pack_and_flow(self, branches: Sequence[Branch]) -> tuple[Pack, Flow]:
        """Return the layout of a pack of these branches, and the function of its velocities."""
        if self._graphs is not None and self._graphs.has_room(branches):
            return self._graphs.load(branches)
        pack = self.dit.lay_out([len(branch.latents) for branch in branches], [branch.condition for branch in branches])
        context = pack.join([branch.context for branch in branches])
        kv = torch.cat([branch.condition.kv for branch in branches], dim=2)
        return pack, lambda latents, times: self.dit.velocities(pack, latents, context, kv, times)

    def _times(self, members: _PackMembers) -> torch.Tensor:
        """Return the flow time of each branch, and one for the empty branch at the end of the pack."""
        return on_device(torch.tensor([*members.times(), 0.0], dtype=self.dit.dtype), self.dit.device)
