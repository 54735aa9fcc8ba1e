# SPDX-License-Identifier: Apache-2.0
"""Seconds per stage of one job."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from acestep_consumer.job import Rendering
from acestep_consumer.tracing import stage_span
from acestep_schemas.events import Timings


class Stopwatch:
    """Starts on creation; each stage is measured by ``with watch("plan"):``."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the body as ``stage``, a span of the job's trace."""
        start = time.perf_counter()
        try:
            with stage_span(stage):
                yield
        finally:
            self._stages[stage] = time.perf_counter() - start

    def timings(self, rendering: Rendering, queued_s: float | None) -> Timings:
        """Return all stages so far, with what the renderer measured itself, rounded to milliseconds."""
        seconds = {**self._stages, "render": rendering.render_s, "encode": rendering.encode_s}
        if queued_s is not None:
            seconds["queued"] = queued_s
        seconds["total"] = time.perf_counter() - self._start
        return Timings(**{stage: round(seconds[stage], 3) for stage in Timings.model_fields if stage in seconds})
