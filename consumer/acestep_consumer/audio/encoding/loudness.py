# SPDX-License-Identifier: Apache-2.0
"""Loudness of a song: integrated loudness and true peak by EBU R 128 (ITU-R BS.1770), measured by FFmpeg."""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Final

import av
from av.audio.frame import AudioFrame
from av.filter import Graph

from acestep_consumer.audio.levels import Levels

_SILENCE_LUFS: Final = -69.9
"""FFmpeg says -70 of silence."""
_NO_PEAK_DB: Final = -100.0


def gain_db(measured: Levels, target_lufs: float, ceiling_db: float) -> float:
    """Return the gain to the target; less where the true peak would be above the ceiling. Silence stays as it is."""
    if measured.lufs is None:
        return 0.0
    return min(target_lufs - measured.lufs, ceiling_db - measured.true_peak_db)


def measure(frames: Iterable[AudioFrame], layout: str, sample_rate: int) -> Levels:
    """Measure a song, given its samples as planar float frames. It takes a second for 200 s of sound."""
    graph = Graph()
    source = graph.add_abuffer(format="fltp", sample_rate=sample_rate, layout=layout)
    meter, sink = graph.add("ebur128", "peak=true:metadata=1:framelog=quiet"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    found: dict[str, str] = {}
    for frame in chain(frames, (None,)):
        graph.push(frame)
        found = _latest(graph) or found
    return _levels(found)


def _latest(graph: Graph) -> dict[str, str]:
    """Return the measurements so far, of the last frame that has come through; empty where none has."""
    found: dict[str, str] = {}
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return found
        found = frame.metadata


def _levels(found: dict[str, str]) -> Levels:
    lufs, peak = (float(found.get(f"lavfi.r128.{name}", "nan")) for name in ("I", "true_peak"))
    return Levels(
        lufs=lufs if lufs > _SILENCE_LUFS else None,
        true_peak_db=20 * math.log10(peak) if peak > 0 else _NO_PEAK_DB,
    )
