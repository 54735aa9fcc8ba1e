# SPDX-License-Identifier: Apache-2.0
"""Lyric alignment: when each line of a song is sung, from the attention of a few heads of the DiT to the lyrics.

The heads' attention is reduced to two matrices where it is computed (``HeadSums``); the rest is done with these on the
CPU. A frame is a token of the DiT, 0.08 s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from acestep_consumer.audio.time_warping import Warp, warped
from acestep_consumer.engine.renderer.lyrics.medians import COLUMNS, ROWS, subtract_medians
from acestep_schemas.events import LyricLine, LyricToken

AlignmentHeads = Mapping[int, tuple[int, ...]]
"""The heads whose cross-attention follows the singing, by layer; both are counted from 0."""

DEFAULT_HEADS: Final[AlignmentHeads] = MappingProxyType({2: (6,), 3: (10, 11), 4: (3,), 5: (8, 9), 6: (8,)})
"""ACE-Step's own, for models whose config names none."""

CONFIG: Final = "lyric_alignment_layers_config"
"""The field of a model's config that names its heads."""

_EPSILON: Final = 1e-9
_INCOMPLETE: Final = "\ufffd"


def heads_of(config: Mapping[str, Any]) -> AlignmentHeads | None:
    """Return the heads that a model's config names, as in ``{"2": [6], "3": [10, 11]}``; None: it names none.

    Raises ``ValueError`` for a field of another form.
    """
    named = config.get(CONFIG)
    if not named:
        return None
    try:
        return {int(layer): tuple(int(head) for head in heads) for layer, heads in named.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG} of its config is no table of layers and heads: {named!a}") from error


def existing_heads(named: AlignmentHeads | None, config: Mapping[str, Any]) -> AlignmentHeads:
    """Return the heads that a DiT with this config has, of those that are named, or of ACE-Step's own."""
    layers, count = config["num_hidden_layers"], config["num_attention_heads"]
    found = {
        layer: tuple(head for head in heads if 0 <= head < count)
        for layer, heads in sorted((named or DEFAULT_HEADS).items())
        if 0 <= layer < layers
    }
    return {layer: heads for layer, heads in found.items() if heads}


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one token, or of several that are one character: ``first`` and ``last`` among the lyrics' tokens."""

    text: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class LyricTokens:
    """The tokens of the lyrics that are aligned: ``count`` tokens of the condition, from ``start``."""

    start: int
    count: int
    pieces: tuple[Piece, ...]

    @property
    def span(self) -> slice:
        """The tokens' places in the condition."""
        return slice(self.start, self.start + self.count)

    def sung(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which tokens are no section tags, [tokens]."""
        sung, inside = np.ones(self.count, dtype=bool), False
        for piece in self.pieces:
            inside = inside or "[" in piece.text
            sung[piece.first : piece.last + 1] = not inside and "]" not in piece.text
            inside = inside and "]" not in piece.text
        return sung


@dataclass(frozen=True, slots=True)
class AlignmentRequest:
    """The lyrics that a song is aligned with; ``time``: the flow time to which it is noised for that."""

    lyrics: LyricTokens
    time: float


def pieces_of(texts: Sequence[str], joined: Any) -> Iterator[Piece]:
    """Yield the pieces of tokens, given the text of each; a token may be a part of a character.

    ``joined(first, end)`` returns the text of successive tokens together.
    """
    first = 0
    for last, text in enumerate(texts):
        found = text if first == last else joined(first, last + 1)
        if _INCOMPLETE not in found or last == len(texts) - 1:
            yield Piece(found, first, last)
            first = last + 1


class HeadSums:
    """One song's attention to its lyrics, added up: not all heads' is in memory at a time."""

    def __init__(self) -> None:
        self._heads = 0
        self._consensus: torch.Tensor | float = 0.0
        self._energy: torch.Tensor | float = 0.0
        self._sum: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0
        self._count = 0

    def add(self, attention: torch.Tensor) -> None:
        """Add the attention of some heads, float32 [heads, tokens, frames]."""
        consensus = _consensus(attention)
        self._heads += len(attention)
        self._count += consensus.numel()
        self._consensus = self._consensus + consensus.sum(0)
        self._energy = self._energy + attention.sum(0)
        self._sum = self._sum + consensus.sum(dtype=torch.float64)
        self._squares = self._squares + consensus.square().sum(dtype=torch.float64)

    def matrices(self) -> torch.Tensor:
        """Return consensus and energy of all heads, [2, tokens, frames], where the attention was. Nothing is copied.

        The consensus is a z-score; the energy is scaled to 0 to 1.
        """
        energy = torch.as_tensor(self._energy) / self._heads
        consensus = torch.as_tensor(self._consensus) / self._heads
        mean = torch.as_tensor(self._sum) / self._count
        deviation = (torch.as_tensor(self._squares) / self._count - mean.square()).clamp(min=0).sqrt()
        lowest, highest = energy.aminmax()
        return torch.stack(
            [
                ((consensus - mean) / (deviation + _EPSILON)).float(),
                (energy - lowest) / (highest - lowest + _EPSILON),
            ]
        )


def _consensus(attention: torch.Tensor) -> torch.Tensor:
    """Return where token and frame find each other, [heads, tokens, frames]: high where each prefers the other.

    A token or a frame with attention everywhere has none.
    """
    # Each softmax along contiguous memory: over the last dimension but one, torch takes ten times as long.
    found = attention.contiguous().softmax(dim=-1).mul_(attention.mT.contiguous().softmax(dim=-1).mT)
    return subtract_medians(subtract_medians(found, ROWS), COLUMNS).square_()


@dataclass(frozen=True, slots=True)
class AlignedLyrics:
    """The lyrics of one song with times, and how well they are sung, 0 to 1."""

    lines: tuple[LyricLine, ...]
    score: float


def align(matrices: torch.Tensor, lyrics: LyricTokens, frame_s: float, warp: Warp = warped) -> AlignedLyrics | None:
    """Return a song's lyrics with times, from ``HeadSums.matrices`` on the CPU. Frames last ``frame_s`` seconds.

    None where the attention is no numbers. ``warp``: ``warped``, wherever it runs.
    """
    if not matrices.isfinite().all():
        return None
    found = warp(matrices.numpy(), lyrics.sung())
    lines = lines_of(lyrics, [(first * frame_s, last * frame_s) for first, last in found.frames])
    return AlignedLyrics(tuple(lines), found.score)


def lines_of(lyrics: LyricTokens, times: Sequence[tuple[float, float]]) -> Iterator[LyricLine]:
    """Yield the lines of lyrics, given the start and the end of each token in seconds. Empty lines are left out."""
    line: list[Piece] = []
    for index, piece in enumerate(lyrics.pieces):
        line.append(piece)
        if "\n" not in piece.text and index < len(lyrics.pieces) - 1:
            continue
        text = "".join(part.text for part in line).strip()
        if text:
            yield LyricLine(
                text=text,
                start_s=round(times[line[0].first][0], 3),
                end_s=round(times[line[-1].last][1], 3),
                tokens=tuple(
                    LyricToken(
                        text=part.text.rstrip("\n"),
                        start_s=round(times[part.first][0], 3),
                        end_s=round(times[part.last][1], 3),
                    )
                    for part in line
                    if part.text.rstrip("\n")
                ),
            )
        line = []
