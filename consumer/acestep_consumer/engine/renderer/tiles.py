# SPDX-License-Identifier: Apache-2.0
"""Where a song's latents are cut into windows of few lengths, and how many windows are decoded at once.

A convolution pads with zeros at the ends of what it is given. At a song's own ends that is how the decoder was trained.
At a cut it is wrong, and the error reaches as far as the decoder sees: so windows overlap, and each gives only what
lies that far from its cuts. For the same reason no window hangs over a song's end: the last one moves back until it
fits, and overlaps its neighbour more.
"""

from dataclasses import dataclass

# What a window between two others adds, in latents; with its overlaps that is its length. Few lengths are few shapes to
# compile. At 25 latents a second, songs of 30, 60, 120 and 300 s fill 2, 4, 8 and 20 windows of the first kind with
# at most 4% to spare; the others are for songs too short for it, below 16 s and below 6 s.
_ADVANCES = (376, 120, 24)

# How many windows go through the decoder together. Two, on an H200, is a shape for which cuDNN picks an algorithm five
# times slower than for the others.
_BATCHES = (8, 4)


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of a song, ``start`` to ``stop``, and the part of it that is kept; all in latents of the song."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def lengths(overlap: int) -> tuple[int, ...]:
    """Return the lengths that windows have, longest first; songs below the last are decoded in one piece."""
    return tuple(advance + 2 * overlap for advance in _ADVANCES)


def layout(frames: int, overlap: int) -> tuple[Tile, ...]:
    """Cut a song of ``frames`` latents into windows of one length that keep each of its latents once, in order.

    What is kept lies at least ``overlap`` latents from a cut; a song's own ends are no cuts. A song shorter than the
    shortest length is one window of its own length.
    """
    length = next((each for each in lengths(overlap) if each <= frames), frames)
    tiles: list[Tile] = []
    kept = 0
    while kept < frames:
        start = min(max(kept - overlap, 0), frames - length)
        stop = start + length
        tiles.append(Tile(start, stop, kept, frames if stop == frames else stop - overlap))
        kept = tiles[-1].keep_to
    return tuple(tiles)


def batch_sizes(tiles_at_once: int) -> tuple[int, ...]:
    """Return the sizes that batches of at most ``tiles_at_once`` windows may have, largest first: one or two of them.

    Raises:
        ValueError: ``tiles_at_once`` is below 1.
    """
    if tiles_at_once < 1:
        raise ValueError(f"tiles_at_once must be 1 or more, not {tiles_at_once}")
    return tuple(size for size in _BATCHES if size <= tiles_at_once) or (1,)
