# SPDX-License-Identifier: Apache-2.0
"""Flow times of a song's denoising steps, from 1 (noise) to 0 (song), as ACE-Step computes them."""

import torch


def flow_times(steps: int, shift: float, given: tuple[float, ...] | None = None) -> tuple[float, ...]:
    """Return the time before each step and, last, 0. ``given`` times take the place of ``steps`` and ``shift``."""
    if given is not None:
        times = torch.tensor(given, dtype=torch.float32)
    else:
        linear = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)[:-1]
        times = linear if shift == 1 else shift * linear / (1 + (shift - 1) * linear)
    return (*times.tolist(), 0.0)


def started_from_source(times: tuple[float, ...], strength: float) -> tuple[float, ...]:
    """Return the part of ``times`` that is left for a song that starts from its source.

    It starts at the time nearest to 1 - ``strength`` (0 to 1); the earlier steps are dropped.
    """
    wanted = 1.0 - strength
    first = min(range(len(times) - 1), key=lambda index: abs(times[index] - wanted))
    return times[first:]
