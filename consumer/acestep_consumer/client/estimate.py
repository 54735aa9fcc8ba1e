# SPDX-License-Identifier: Apache-2.0
"""Estimates of waiting time: a new request's place and the seconds to its songs, and when a full queue has room. Pure.

Jobs run side by side in a worker: ``prefetch`` of them, on one GPU. ``seconds_per_job`` is the time of a job from the
broker's delivery to its end, beside the others. So a busy worker ends ``prefetch / seconds_per_job`` jobs a second
(Little's law); that the jobs share a GPU is in the seconds already, and is not counted again.

Only ``acestep.generate`` is considered. Where workers forward requests to larger GPUs (``ACESTEP_ROUTE_BY_TIER``), such
a request waits a second time, in the queue of a tier: its place is that of the first wait, and its seconds leave the
second one out.
"""

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from acestep_schemas.events import JobCompleted, JobEvent, Worker, WorkerEvent

# No job's time is known: long enough to spare the broker, short enough to use a free place soon.
GUESS_S: Final = 10.0
# Without a consumer, a place opens when a worker has started, which takes as long as loading a model.
NO_WORKER_S: Final = 30.0
SHORTEST_S, LONGEST_S = 1.0, 300.0
# The mean follows the last ten jobs or so: workloads change.
_WEIGHT: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEstimate:
    """The place and the waiting time of a request that was submitted just now. None: not known; ``note`` says why.

    Attributes:
        position: requests that wait in the queue, this one among them: 1 is next, 0 is running already.
        in_hand: jobs that run on the workers that answered.
        workers: workers that answered and take requests.
        expected_s: seconds until its songs are there.
        note: what is not known and why, or what makes the figures doubtful.
    """

    position: int | None
    in_hand: int | None
    workers: int
    expected_s: float | None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestQueueDepth:
    """The request queue at one moment: messages that wait, and AMQP consumers."""

    ready: int
    consumers: int


class RetryAfter:
    """Mean seconds of a job, learned from ``completed`` and workers' events, and when to retry at a full queue."""

    def __init__(self) -> None:
        self._job_s: float | None = None

    @property
    def job_s(self) -> float | None:
        """The mean seconds of a job; None before the first event that says any."""
        return self._job_s

    def learn(self, event: JobEvent | WorkerEvent) -> None:
        """Take an event into account, if it says how long a job took."""
        took_s = _seconds(event)
        if took_s is not None:
            self._job_s = took_s if self._job_s is None else self._job_s + _WEIGHT * (took_s - self._job_s)

    def retry_after(self, workers: int | None) -> float:
        """Return the seconds until a full queue is likely to have room.

        With ``workers`` consumers that each end a job every so often, one of them takes the next message after a
        job's time over their number. A worker that runs several jobs is faster; waiting a little too long is the
        better mistake.
        """
        if workers == 0:
            wait_s = NO_WORKER_S
        elif self._job_s is None:
            wait_s = GUESS_S
        else:
            wait_s = min(max(self._job_s / (workers or 1), SHORTEST_S), LONGEST_S)
        return wait_s * random.uniform(1.0, 1.25)  # noqa: S311 - spreads load, guards no secret


def estimate(
    depth: RequestQueueDepth | None, answers: Collection[Worker], job_s: float | None, problem: str | None = None
) -> QueueEstimate:
    """Return the estimate for the request that came to the queue last.

    Args:
        depth: the queue after the request came to it; None: unknown.
        answers: the latest announcement of each worker.
        job_s: the mean seconds of a job as far as this client knows, for workers that have none of their own.
        problem: why the queue or the workers could not be asked.
    """
    taking = [worker for worker in answers if worker.state == "ready" and worker.prefetch > 0]
    expected_s = None if depth is None or not depth.consumers else expected(depth.ready, taking, job_s)
    return QueueEstimate(
        position=None if depth is None else depth.ready,
        in_hand=sum(worker.in_hand for worker in answers) if answers else None,
        workers=len(taking),
        expected_s=None if expected_s is None else round(expected_s, 1),
        note=_note(depth, len(taking), problem, known=expected_s is not None),
    )


def expected(position: int, workers: Collection[Worker], job_s: float | None) -> float | None:
    """Return the seconds until the job at ``position`` has ended; None: no worker is known, or none has a figure.

    It begins once those before it have begun: a free slot takes one at once, and each further one takes a job's end.
    The running jobs are somewhere on their way, so the first of these ends comes after half the usual distance.
    """
    known = [worker.seconds_per_job for worker in workers if worker.seconds_per_job]
    usual_s = fmean(known) if known else job_s
    if not workers or not usual_s:
        return None
    ends_per_s = sum(worker.prefetch / (worker.seconds_per_job or usual_s) for worker in workers)
    ends_needed = max(0, position - _free_slots(workers))
    wait_s = (ends_needed - 0.5) / ends_per_s if ends_needed else 0.0
    # Faster workers take more of the jobs, so they count for more in the mean time of one.
    return wait_s + sum(worker.prefetch for worker in workers) / ends_per_s


def _free_slots(workers: Iterable[Worker]) -> int:
    return sum(max(0, worker.prefetch - worker.in_hand) for worker in workers)


def _note(depth: RequestQueueDepth | None, workers: int, problem: str | None, *, known: bool) -> str | None:
    if depth is None:
        return f"the queue could not be asked: {problem or 'the broker did not answer in time'}"
    if not depth.consumers:
        return "no worker takes requests now: start one with `acestep-consumer run`"
    if problem is not None:
        return f"the workers could not be asked: {problem}"
    if not known:
        return "no worker has finished a job yet" if workers else "no worker answered in time"
    # A worker has several consumers while its prefetch changes, so this may be all of them.
    few = f"{workers} answered for {depth.consumers} consumers: whoever did not is not counted"
    return few if workers < depth.consumers else None


def _seconds(event: JobEvent | WorkerEvent) -> float | None:
    match event:
        case JobCompleted(data=data):
            return data.timings.total
        case WorkerEvent(data=worker):
            return worker.seconds_per_job
    return None
