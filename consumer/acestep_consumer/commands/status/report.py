# SPDX-License-Identifier: Apache-2.0
"""The report of ``status``, calculated from what the sources say. Pure; ``--json`` prints it unchanged.

The backlog is estimated twice: from how long jobs take and the running ones still need (``client.estimate``), and from
the rate at which jobs ended lately. The two differ when that rate was one of little demand, or when jobs wait for more
than the GPU.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from acestep_consumer.broker.inspection import QueueDepth
from acestep_consumer.broker.management import RequestQueue
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, UNROUTED, tier_queue
from acestep_consumer.client.estimate import WorkerLoad, expected
from acestep_schemas.events import JobCompleted, JobEvent, Worker, WorkerEvent

RateSource = Literal["broker", "events"]
WINDOW_S: Final = 300.0
ASK_EVERY_S: Final = 2.0
SILENT_S: Final = 5 * ASK_EVERY_S
"""A worker that has not answered repeated requests for this long is gone."""
ANSWERED_S: Final = 2.0
"""Every worker has answered by then; it answers once a second at most."""
_JOBS: Final = 100
_MUCH_SLOWER: Final = 1.5


class _StatusPart(BaseModel):
    model_config = ConfigDict(frozen=True)


class QueuePart(_StatusPart):
    """The request queue.

    Attributes:
        ready: messages that wait, at most ``limit``.
        unacked: messages in progress; None: unknown.
        unacked_from: the broker's management API, or the workers' answers if all of them answered.
        consumers: AMQP consumers: one per worker, for a while several after its prefetch changed.
        bound: most messages that can be accepted and unfinished: the limit plus all prefetch; None: unknown. With
            forwarding by tier, ``limit`` more in each tier's queue.
    """

    name: str
    ready: int
    unacked: int | None
    unacked_from: Literal["broker", "workers"] | None = None
    limit: int
    limit_from: Literal["settings", "broker"]
    consumers: int
    bound: int | None


class TierQueuePart(_StatusPart):
    """Requests forwarded to a tier; ``ready``: those that wait in its queue."""

    tier: str
    ready: int


class WorkerPart(_StatusPart):
    """A worker that consumes or has answered. None: unknown."""

    worker_id: str
    state: str | None = None
    prefetch: int | None = None
    in_hand: int | None = None
    stages: dict[str, int] | None = None
    stage_limits: dict[str, int | None] | None = None
    tier: str | None = None
    vram_gb: float | None = None
    models: tuple[str, ...] = ()


class PacePart(_StatusPart):
    """Throughput. ``jobs_a_minute`` and ``job_s``, mean seconds a worker takes for a job, are None while unknown."""

    jobs_a_minute: float | None
    job_s: float | None
    source: RateSource | None
    heard_s: float


class StatusReport(_StatusPart):
    """The whole report.

    Attributes:
        tiers: the tiers with waiting requests; None: no forwarding (``ACESTEP_ROUTE_BY_TIER``).
        eta_s: whole seconds until the requests that wait now are done; None: unknown.
        eta_most_s: the same at the recent rate, where that is much slower; else None.
    """

    time: datetime
    broker: str
    version: str | None
    queue: QueuePart
    tiers: tuple[TierQueuePart, ...] | None = None
    workers: tuple[WorkerPart, ...]
    dead_letters: int
    unrouted_events: int
    pace: PacePart
    eta_s: int | None
    eta_most_s: int | None = None
    notes: tuple[str, ...]


class ObservedEvents:
    """Statistics of the events received so far. Times are seconds of a monotonic clock."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._ended_s: deque[float] = deque()
        self._job_s: deque[float] = deque(maxlen=_JOBS)
        self._workers: dict[str, tuple[float, Worker]] = {}

    def add(self, event: JobEvent | WorkerEvent, now_s: float) -> None:
        """Count an event."""
        if isinstance(event, WorkerEvent):
            self._workers[event.data.worker_id] = now_s, event.data
            if event.data.seconds_per_job is not None and not self._job_s:
                self._job_s.append(event.data.seconds_per_job)
        elif event.terminal:
            self._ended_s.append(now_s)
            if isinstance(event, JobCompleted) and event.data.timings.total is not None:
                self._job_s.append(event.data.timings.total)

    def workers(self, now_s: float) -> dict[str, Worker]:
        """Return the latest status of each live worker, by its id."""
        return {
            name: data
            for name, (at_s, data) in sorted(self._workers.items())
            if data.state != "stopped" and at_s >= now_s - SILENT_S
        }

    def pace(self, now_s: float) -> PacePart:
        """Return the throughput of the last five minutes, or since the subscription began."""
        while self._ended_s and self._ended_s[0] < now_s - WINDOW_S:
            self._ended_s.popleft()
        window_s = min(now_s - self._began_s, WINDOW_S)
        a_minute = 60 * len(self._ended_s) / window_s if self._ended_s and window_s > 0 else None
        return PacePart(
            jobs_a_minute=None if a_minute is None else round(a_minute, 2),
            job_s=round(fmean(self._job_s), 3) if self._job_s else None,
            source=None if a_minute is None else "events",
            heard_s=round(window_s, 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusInputs:
    """Input from all sources. Times are of the same clock as those of ``ObservedEvents``.

    Attributes:
        depths: of queues, by name.
        tiers: the tiers that have queues; None: no forwarding.
        asked_s: when the workers were first asked for their status; None: they were not.
        monitored: the management API's answer; None: there is none.
    """

    broker: str
    version: str | None
    limit: int
    depths: Mapping[str, QueueDepth | None]
    tiers: tuple[str, ...] | None = None
    asked_s: float | None = None
    monitored: RequestQueue | None
    observed: ObservedEvents
    now_s: float


def status_of(seen: StatusInputs, notes: Iterable[str] = ()) -> StatusReport:
    """Calculate the report."""
    requests = seen.depths[GENERATE] or QueueDepth(0, 0)
    limit, limit_from = _limit(seen)
    tiers = _tiers(seen)
    if tiers is not None:
        # The broker's figures are of one queue, but each worker's prefetch is split among several, and an ack may be of
        # a forwarded request. So the workers' own figures are used.
        seen = replace(seen, monitored=None)
    workers = _workers(seen)
    pace = _pace(seen)
    prefetch = _sum_of_prefetch(seen, workers, requests.consumers)
    eta_s, eta_most_s = backlog(requests.ready, pace, None if prefetch is None else _loads(seen, workers))
    unacked, unacked_from = _unacked(seen, workers, requests.consumers)
    return StatusReport(
        time=datetime.now(UTC),
        broker=seen.broker,
        version=seen.version,
        queue=QueuePart(
            name=GENERATE,
            ready=requests.ready,
            unacked=unacked,
            unacked_from=unacked_from,
            limit=limit,
            limit_from=limit_from,
            consumers=requests.consumers,
            bound=None if prefetch is None else limit + prefetch,
        ),
        tiers=tiers,
        workers=workers,
        dead_letters=_ready(seen, DEAD_LETTER),
        unrouted_events=_ready(seen, UNROUTED),
        pace=pace,
        eta_s=eta_s,
        eta_most_s=eta_most_s,
        notes=(*notes, *_unattended(seen, tiers or ())),
    )


def backlog(ready: int, pace: PacePart, loads: Sequence[WorkerLoad] | None) -> tuple[int | None, int | None]:
    """Return ``eta_s`` and ``eta_most_s`` for ``ready`` waiting requests.

    Args:
        ready: waiting requests.
        pace: recent throughput.
        loads: all workers that take requests; None: some are not known, and the throughput alone counts.
    """
    if not ready:
        return 0, None
    by_rate = 60 * ready / pace.jobs_a_minute if pace.jobs_a_minute else None
    if loads is None or not (pace.job_s or any(load.seconds_per_job for load in loads)):
        return _whole(by_rate), None
    by_jobs = expected(ready, loads, pace.job_s)
    much_slower = by_jobs is not None and by_rate is not None and by_rate > _MUCH_SLOWER * by_jobs
    return _whole(by_jobs), _whole(by_rate) if much_slower else None


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def _loads(seen: StatusInputs, workers: tuple[WorkerPart, ...]) -> tuple[WorkerLoad, ...]:
    """Return the load of each worker that takes requests; one that did not answer is taken to be full."""
    reported = seen.observed.workers(seen.now_s)
    return tuple(
        WorkerLoad.of(reported[each.worker_id], each.prefetch)
        if each.worker_id in reported
        else WorkerLoad(prefetch=each.prefetch or 0, in_hand=each.prefetch or 0)
        for each in workers
        if each.state != "draining" and each.prefetch
    )


def _tiers(seen: StatusInputs) -> tuple[TierQueuePart, ...] | None:
    if seen.tiers is None:
        return None
    waiting = ((tier, _ready(seen, tier_queue(tier))) for tier in seen.tiers)
    return tuple(TierQueuePart(tier=tier, ready=ready) for tier, ready in waiting if ready)


def _unattended(seen: StatusInputs, tiers: Iterable[TierQueuePart]) -> Iterator[str]:
    """Warn of requests that wait for a tier of which no worker answered, once all had time to."""
    if seen.asked_s is None or seen.now_s < seen.asked_s + ANSWERED_S:
        return
    there = {worker.tier for worker in seen.observed.workers(seen.now_s).values() if worker.state != "draining"}
    for part in tiers:
        if part.tier not in there:
            yield (
                f"{part.ready:,} waiting in {tier_queue(part.tier)}, and no worker of {part.tier} answered: start one. "
                "After a minute, other workers with ACESTEP_ROUTE_BY_TIER take them, within their own limits"
            )


def _workers(seen: StatusInputs) -> tuple[WorkerPart, ...]:
    """Return the workers: the broker's consumers with what they reported, or without that those that reported."""
    reported = seen.observed.workers(seen.now_s)
    if seen.monitored is None:
        return tuple(map(_worker, reported.values()))
    return tuple(
        (
            _worker(reported[each.worker_id]) if each.worker_id in reported else WorkerPart(worker_id=each.worker_id)
        ).model_copy(update={"prefetch": each.prefetch})
        for each in seen.monitored.consumers
    )


def _worker(data: Worker) -> WorkerPart:
    return WorkerPart(
        worker_id=data.worker_id,
        state=data.state,
        prefetch=data.prefetch,
        in_hand=data.in_hand,
        stages=None if data.stages is None else data.stages.model_dump(),
        stage_limits=None if data.stage_limits is None else data.stage_limits.model_dump(),
        tier=data.tier,
        vram_gb=data.vram_gb,
        models=data.models,
    )


def _pace(seen: StatusInputs) -> PacePart:
    """Return the broker's rate, which counts all acks; without it, that of events since this command listens."""
    pace = seen.observed.pace(seen.now_s)
    by_broker = seen.monitored.acked_per_s if seen.monitored else None
    if not by_broker:
        return pace
    return pace.model_copy(update={"jobs_a_minute": round(60 * by_broker, 2), "source": "broker"})


def _limit(seen: StatusInputs) -> tuple[int, Literal["settings", "broker"]]:
    if seen.monitored is not None and seen.monitored.limit is not None:
        return seen.monitored.limit, "broker"
    return seen.limit, "settings"


def _unacked(
    seen: StatusInputs, workers: tuple[WorkerPart, ...], consumers: int
) -> tuple[int | None, Literal["broker", "workers"] | None]:
    """Return the broker's count; without it, the sum of the workers' own if all of them answered."""
    if seen.monitored is not None:
        return seen.monitored.unacked, "broker"
    if not workers or _consuming(workers) < consumers:
        return None, None
    return sum(worker.in_hand or 0 for worker in workers), "workers"


def _consuming(workers: tuple[WorkerPart, ...]) -> int:
    """Count the workers that consume; a draining one still has jobs, but no consumer."""
    return sum(worker.state != "draining" for worker in workers)


def _sum_of_prefetch(seen: StatusInputs, workers: tuple[WorkerPart, ...], consumers: int) -> int | None:
    """Return the sum of prefetch; None if a consumer's is unknown: it did not answer, or is not in the API yet."""
    known = [worker.prefetch for worker in workers if worker.prefetch is not None]
    counted = len(workers) if seen.monitored is None else sum(each.consumers for each in seen.monitored.consumers)
    return sum(known) if counted >= consumers and len(known) == len(workers) else None


def _ready(seen: StatusInputs, queue: str) -> int:
    depth = seen.depths.get(queue)
    return depth.ready if depth else 0
