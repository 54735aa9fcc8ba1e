# SPDX-License-Identifier: Apache-2.0
"""Gives every encoder process music in place of a song's own samples: random weights make noise.

Python imports this at its start where the folder is on PYTHONPATH; `bench_worker_gpu --sound music` puts it there. A
further sitecustomize on the path, which this one hides, is run as well.
"""

import runpy
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acestep_consumer.audio.encoding.encode import Samples
    from acestep_consumer.audio.formats import Format
    from acestep_consumer.audio.levels import Levels

if "acestep_consumer.audio.encoding" in sys.orig_argv:
    import numpy as np

    from acestep_consumer.audio.encoding import encode
    from tests.support.music import music

    _write_song = encode.write_song
    _LOOP_S = 30

    @cache
    def _loop(sample_rate: int) -> "Samples":
        return music(_LOOP_S, sample_rate)

    def _write_music(
        samples: "Samples", path: Path, wanted: "Format", sample_rate: int, threads: int = 1
    ) -> "Levels | None":
        loop = _loop(sample_rate)
        times = -(-samples.shape[1] // loop.shape[1])
        looped = np.tile(loop, times)[: len(samples), : samples.shape[1]]
        return _write_song(looped, path, wanted, sample_rate, threads)

    encode.write_song = _write_music

_others = (Path(folder) / "sitecustomize.py" for folder in sys.path)
if _hidden := next((file for file in _others if file.is_file() and not file.samefile(__file__)), None):
    runpy.run_path(str(_hidden))
