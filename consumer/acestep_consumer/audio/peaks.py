# SPDX-License-Identifier: Apache-2.0
"""Waveform overview of a song: one unsigned byte per equal slice, small enough for an event."""

import base64
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_PEAKS: Final = 400
"""Slices of a song: more than a player bar has room for, and 536 characters of an event."""

_FULL_SCALE: Final = 255


def peaks_of(samples: NDArray[np.float32], gain: float = 1.0) -> str:
    """Return the largest absolute sample of each of up to 400 equal slices, 255 being full scale, as Base64.

    ``samples``: [channels, n], n > 0, finite, full scale 1.0; what is over full scale counts as full scale. A song of
    fewer samples than slices has a slice for each. ``gain``: what the samples are multiplied by on their way out.
    """
    length = samples.shape[1]
    starts = np.linspace(0, length, min(MAX_PEAKS, length), endpoint=False).astype(np.intp)
    # Both extremes in place of absolute values, which would need a copy of the song.
    highest = np.maximum.reduceat(samples, starts, axis=1).max(axis=0)
    lowest = np.minimum.reduceat(samples, starts, axis=1).min(axis=0)
    loudest = np.clip(np.maximum(highest, -lowest) * gain, 0.0, 1.0)
    return base64.b64encode(np.rint(loudest * _FULL_SCALE).astype(np.uint8).tobytes()).decode("ascii")
