# SPDX-License-Identifier: Apache-2.0
"""Numbers for eyes. What is not known is a dash."""

from typing import Final

UNKNOWN: Final = "–"
_MINUTE, _HOUR = 60, 3600
_STEPS: Final = ("B", "kB", "MB", "GB", "TB")
_STEP: Final = 1000


def seconds(value: float | None) -> str:
    """Write seconds as ``1.5 s``, ``4 min 10 s`` or ``2 h 05 min``."""
    if value is None:
        return UNKNOWN
    if value < _MINUTE:
        return f"{value:.1f} s" if 0 < value < 10 else f"{value:.0f} s"  # noqa: PLR2004 - two digits either way
    whole = round(value)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"


def size(value: float | None) -> str:
    """Write bytes as ``512 B`` or ``1.5 MB``, in steps of a thousand."""
    if value is None:
        return UNKNOWN
    for unit in _STEPS:
        if abs(value) < _STEP or unit == _STEPS[-1]:
            break
        value /= _STEP
    return f"{value:.0f} {unit}" if unit == _STEPS[0] else f"{value:.1f} {unit}"


def share(value: float | None) -> str:
    """Write 0 to 1 as a percentage."""
    return UNKNOWN if value is None else f"{value:.0%}"


def number(value: float | None) -> str:
    """Write a count, or a rate with at most two digits behind the point."""
    return UNKNOWN if value is None else f"{round(value, 2):,g}" if value < 10_000 else f"{value:,.0f}"  # noqa: PLR2004 - `g` would write an exponent
