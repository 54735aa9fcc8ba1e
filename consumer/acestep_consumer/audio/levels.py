# SPDX-License-Identifier: Apache-2.0
"""Levels of a song: its loudness, and what it was raised by. ``encoding.loudness`` measures them, with FFmpeg."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Integrated loudness in LUFS, None for silence, and true peak in dB of full scale.

    ``raised_db``: what the song was raised by to get there.
    """

    lufs: float | None
    true_peak_db: float
    raised_db: float = 0.0

    @property
    def gain(self) -> float:
        """Factor that the samples were multiplied by."""
        return float(10 ** (self.raised_db / 20))

    def raised(self, gain_db: float) -> "Levels":
        """Return the levels of the song after it was raised."""
        return Levels(
            lufs=None if self.lufs is None else self.lufs + gain_db,
            true_peak_db=self.true_peak_db + gain_db,
            raised_db=self.raised_db + gain_db,
        )
