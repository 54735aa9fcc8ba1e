# SPDX-License-Identifier: Apache-2.0
"""When to try again: what this client has heard about how long jobs take."""

import random
from typing import Final

from acestep_schemas.events import JobCompleted, JobEvent, WorkerEvent

# Nothing heard yet: long enough not to hammer the broker, short enough not to leave a free place unused.
GUESS_S: Final = 10.0
# Nobody consumes: a place opens when a worker has started, which takes as long as loading a model.
NO_WORKER_S: Final = 30.0
SHORTEST_S, LONGEST_S = 1.0, 300.0
# The mean follows the last ten jobs or so: workloads change.
_WEIGHT: Final = 0.1


class RetryAfter:
    """The mean seconds of a job in a worker's hands, from ``completed`` and workers' events that pass by anyway."""

    def __init__(self) -> None:
        self._job_s: float | None = None

    @property
    def job_s(self) -> float | None:
        """That mean; None before anything was heard."""
        return self._job_s

    def hear(self, event: JobEvent | WorkerEvent) -> None:
        """Learn from an event, if there is something to learn."""
        took = _seconds(event)
        if took is not None:
            self._job_s = took if self._job_s is None else self._job_s + _WEIGHT * (took - self._job_s)

    def retry_after(self, workers: int | None) -> float:
        """Return the seconds until a place in a full queue is likely to be free.

        With ``workers`` consumers that each end a job every so often, one of them takes the next message after a
        job's time over their number. A worker with several jobs in hand is faster; waiting a little longer is the
        better mistake.
        """
        if workers == 0:
            wait = NO_WORKER_S
        elif self._job_s is None:
            wait = GUESS_S
        else:
            wait = min(max(self._job_s / (workers or 1), SHORTEST_S), LONGEST_S)
        return wait * random.uniform(1.0, 1.25)  # noqa: S311 - spreads load, guards no secret


def _seconds(event: JobEvent | WorkerEvent) -> float | None:
    match event:
        case JobCompleted(data=data):
            return data.timings.total
        case WorkerEvent(data=announced):
            return announced.seconds_per_job
    return None
