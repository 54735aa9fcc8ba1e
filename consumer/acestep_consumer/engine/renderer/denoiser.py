# SPDX-License-Identifier: Apache-2.0
"""The DiT's part of a denoising step, for any songs of one DiT.

The layout of a pack is kept for as long as the same songs step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from acestep_consumer.engine.renderer.cuda_graphs import GraphedFlow
from acestep_consumer.engine.renderer.pack import Pack
from acestep_consumer.engine.renderer.packed_dit import Condition, PackedDit
from acestep_consumer.engine.renderer.sample import Sample


@dataclass(frozen=True, slots=True, eq=False)
class _PackMembers:
    """Who is in a pack: each song with its voices at this step."""

    songs: tuple[Sample, ...]
    voices: tuple[tuple[Condition, ...], ...]

    def is_again(self, other: "_PackMembers | None") -> bool:
        """Whether the same songs with the same voices were packed before; by identity, nothing is compared."""
        return other is not None and self.members() == other.members()

    def conditions(self) -> list[Condition]:
        return [condition for voices in self.voices for condition in voices]

    def per_voice(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Repeat what is there for each song once for each of its voices."""
        return [part for part, voices in zip(parts, self.voices, strict=True) for _ in voices]

    def members(self) -> list[int]:
        return [id(member) for song, voices in zip(self.songs, self.voices, strict=True) for member in (song, *voices)]


class Denoiser:
    """Predicts flow with one DiT.

    Args:
        dit: the DiT.
        graphed: replay small packs as one CUDA graph; for CUDA devices only.
    """

    def __init__(self, dit: PackedDit, *, graphed: bool = False) -> None:
        self.dit = dit
        self._graphed = graphed
        self._cast: _PackMembers | None = None
        self._pack: Pack | None = None
        self._flow: GraphedFlow | None = None

    def velocities(self, songs: Sequence[Sample]) -> list[Sequence[torch.Tensor]]:
        """Return what each song's next step needs: velocities, [frames, channels] for each of its voices.

        They are overwritten by the next call.
        """
        cast = _PackMembers(tuple(songs), tuple(song.voices() for song in songs))
        if not cast.is_again(self._cast):
            self._prepare(cast)
        assert self._pack is not None  # noqa: S101 - prepared above
        assert self._flow is not None  # noqa: S101 - prepared above
        latents = self._pack.join(cast.per_voice([song.latents for song in songs]))
        flow = self._pack.split(self._flow(latents, self._times(cast)))
        ends = list(accumulate(len(voices) for voices in cast.voices))
        return [flow[end - len(voices) : end] for voices, end in zip(cast.voices, ends, strict=True)]

    def forget(self) -> None:
        """Drop the layout and what hangs on it: memory that the next pack will take again."""
        self._cast = self._pack = self._flow = None

    def _prepare(self, cast: _PackMembers) -> None:
        self.forget()
        conditions = cast.conditions()
        frames = [song.frames for song, voices in zip(cast.songs, cast.voices, strict=True) for _ in voices]
        pack = self.dit.lay_out(frames, conditions)
        context = pack.join(cast.per_voice([song.context for song in cast.songs]))
        memory = torch.cat([condition.memory for condition in conditions], dim=2)
        self._flow = GraphedFlow(self.dit, pack, context, memory, graphed=self._graphed)
        self._cast, self._pack = cast, pack

    def _times(self, cast: _PackMembers) -> torch.Tensor:
        """Return the flow time of each voice, and one for the empty voice at the pack's end."""
        times = [song.time for song, voices in zip(cast.songs, cast.voices, strict=True) for _ in voices]
        return torch.tensor([*times, 0.0], dtype=self.dit.dtype).to(self.dit.device, non_blocking=True)
