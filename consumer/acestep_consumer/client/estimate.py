# SPDX-License-Identifier: Apache-2.0
"""Estimates of waiting time: a new request's place and the seconds to its songs, and when a full queue has room. Pure.

A worker runs ``prefetch`` jobs at once, on one GPU. ``seconds_per_job`` is the time of a job from the broker's delivery
to its end, beside the others: that they share a GPU is in the seconds already. Each waiting request takes the slot that
is free first: a running job's slot after the time that the worker says it still needs. Where a worker does not say, its
running jobs are somewhere on their way, evenly spread.

Only ``acestep.generate`` is considered. Where workers forward requests to larger GPUs (``ACESTEP_ROUTE_BY_TIER``), such
a request waits a second time, in the queue of a tier: its place is that of the first wait, and its seconds leave the
second one out.
"""

import heapq
import math
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Self

from acestep_schemas.events import JobCompleted, JobEvent, Worker, WorkerEvent

# No job's time is known: long enough to spare the broker, short enough to use a free place soon.
GUESS_S: Final = 10.0
# Without a consumer, a place opens when a worker has started, which takes as long as loading a model.
NO_WORKER_S: Final = 30.0
SHORTEST_S, LONGEST_S = 1.0, 300.0
# The mean follows the last ten jobs or so: workloads change.
_WEIGHT: Final = 0.1
_UNKNOWN_END: Final = "unknown when: the running jobs take longer than others did, or are the first of their kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEstimate:
    """The place and the waiting time of a request that was submitted just now. None: not known; ``note`` says why.

    Attributes:
        position: requests that wait in the queue, this one among them: 1 is next, 0 is running already.
        in_hand: jobs that run on the workers that answered.
        workers: workers that answered and take requests.
        expected_s: whole seconds until its songs are there.
        note: what is not known and why, or what makes the figures doubtful.
    """

    position: int | None
    in_hand: int | None
    workers: int
    expected_s: int | None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestQueueDepth:
    """The request queue at one moment: messages that wait, and AMQP consumers, or else workers that are busy."""

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
    loads = [WorkerLoad.of(worker) for worker in taking]
    expected_s = None if depth is None or not depth.consumers else expected(depth.ready, loads, job_s)
    measured = bool(job_s) or any(worker.seconds_per_job for worker in taking)
    return QueueEstimate(
        position=None if depth is None else depth.ready,
        in_hand=sum(worker.in_hand for worker in answers) if answers else None,
        workers=len(taking),
        expected_s=None if expected_s is None else math.ceil(expected_s),
        note=_note(depth, len(taking), problem, measured=measured) or (_UNKNOWN_END if expected_s is None else None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """Running jobs of one worker, and how fast it is. ``remaining_s``: as in ``Worker``; shorter than ``in_hand``."""

    prefetch: int
    in_hand: int
    seconds_per_job: float | None = None
    remaining_s: tuple[float | None, ...] = ()

    @classmethod
    def of(cls, worker: Worker, prefetch: int | None = None) -> Self:
        """Take the figures of an announcement; ``prefetch`` where somebody knows it better."""
        return cls(
            prefetch=worker.prefetch if prefetch is None else prefetch,
            in_hand=worker.in_hand,
            seconds_per_job=worker.seconds_per_job,
            remaining_s=worker.remaining_s or (),
        )


def expected(position: int, workers: Collection[WorkerLoad], job_s: float | None) -> float | None:
    """Return the seconds until the job at ``position`` has ended, 0 being one that has just begun.

    None: no worker is known, none has a figure and there is no ``job_s`` either, or nobody knows when a slot is free.
    """
    known = [worker.seconds_per_job for worker in workers if worker.seconds_per_job]
    usual_s = fmean(known) if known else job_s
    if not workers or not usual_s:
        return None
    if not position:
        # Faster workers take more of the jobs, so they count for more in the mean time of one.
        ends_per_s = sum(worker.prefetch / (worker.seconds_per_job or usual_s) for worker in workers)
        return sum(worker.prefetch for worker in workers) / ends_per_s
    slots = [*_slots(workers, usual_s)]
    heapq.heapify(slots)
    end_s = math.inf
    for _ in range(position):
        free_s, slot_s = slots[0]
        end_s = free_s + slot_s
        heapq.heapreplace(slots, (end_s, slot_s))
    return None if math.isinf(end_s) else end_s


def _slots(workers: Collection[WorkerLoad], usual_s: float) -> Iterator[tuple[float, float]]:
    """Yield when each slot is free, and how long a job takes there, in seconds. Infinity: unknown."""
    unreported: list[float] = []
    for worker in workers:
        job_s = worker.seconds_per_job or usual_s
        # After its prefetch became smaller, a worker takes nothing new for the first jobs that end.
        surplus = max(0, worker.in_hand - worker.prefetch)
        reported = worker.remaining_s[surplus : worker.in_hand]
        for left_s in reported:
            yield math.inf if left_s is None else left_s, job_s
        for _ in range(worker.prefetch - worker.in_hand):
            yield 0.0, job_s
        unreported += [job_s] * (min(worker.in_hand, worker.prefetch) - len(reported))
    for number, job_s in enumerate(unreported):
        yield (number + 0.5) / len(unreported) * job_s, job_s


def _note(depth: RequestQueueDepth | None, workers: int, problem: str | None, *, measured: bool) -> str | None:
    if depth is None:
        return f"the queue could not be asked: {problem or 'the broker did not answer in time'}"
    if not depth.consumers:
        return "no worker takes requests now: one may still be loading, else start one with `acestep-consumer run`"
    if problem is not None:
        return f"the workers could not be asked: {problem}"
    if not workers or not measured:
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
