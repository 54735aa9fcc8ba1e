# SPDX-License-Identifier: Apache-2.0
"""What ``status`` answers, and how it follows from what was seen. Pure; ``--json`` prints it as it is.

Jobs run side by side in a worker, and ``ACESTEP_QUEUE_WORKERS`` is how many. So the whole fleet ends a job every
seconds-per-job ÷ sum-of-prefetch, and the queue is empty after as many of those as messages wait.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from acestep_consumer.broker.inspection import QueueDepth
from acestep_consumer.broker.management import RequestQueue
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, UNROUTED, tier_queue
from acestep_schemas.events import JobCompleted, JobEvent, Worker, WorkerEvent

RateSource = Literal["broker", "events"]
WINDOW_S: Final = 300.0
ASK_EVERY_S: Final = 2.0
SILENT_S: Final = 5 * ASK_EVERY_S
"""Workers are asked again and again. One that has not answered for so long is gone, whatever it had in hand."""
ANSWERED_S: Final = 2.0
"""Who is there has answered by then. Workers announce themselves once a second at most, however often one asks."""
_JOBS: Final = 100


class _StatusPart(BaseModel):
    model_config = ConfigDict(frozen=True)


class QueuePart(_StatusPart):
    """The request queue.

    Attributes:
        ready: messages that wait; ``limit`` of them may.
        unacked: messages in workers' hands; None: not known.
        unacked_from: the broker's management API, or the workers' own answers, when all of them answered.
        consumers: AMQP consumers. A worker has one, for a while several after its prefetch changed.
        bound: most messages that can be accepted and not finished: the limit and all prefetch; None: not known. What is
            sent on to larger cards comes on top: ``limit`` in the queue of each tier.
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
    """Requests that were sent on to the cards of a tier, and ``ready``: those of them that wait in its queue."""

    tier: str
    ready: int


class WorkerPart(_StatusPart):
    """A worker that consumes, or that announced itself. None: not known."""

    worker_id: str
    state: str | None = None
    prefetch: int | None = None
    in_hand: int | None = None
    tier: str | None = None
    vram_gb: float | None = None
    models: tuple[str, ...] = ()


class PacePart(_StatusPart):
    """How fast jobs end. ``jobs_a_minute`` and ``job_s`` (seconds in a worker's hands) are None until it is known."""

    jobs_a_minute: float | None
    job_s: float | None
    source: RateSource | None
    heard_s: float


class StatusReport(_StatusPart):
    """The whole answer.

    Attributes:
        tiers: the tiers whose queues hold something; None: nothing is sent on (``ACESTEP_ROUTE_BY_TIER``).
        eta_s: seconds until what waits in the request queue now has been taken and done; None: not known.
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
    eta_s: float | None
    notes: tuple[str, ...]


class ObservedEvents:
    """What events told while somebody listened, of late. Times are seconds of any steady clock."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._ended_s: deque[float] = deque()
        self._job_s: deque[float] = deque(maxlen=_JOBS)
        self._workers: dict[str, tuple[float, Worker]] = {}

    def hear(self, event: JobEvent | WorkerEvent, now_s: float) -> None:
        """Take in an event."""
        if isinstance(event, WorkerEvent):
            self._workers[event.data.worker_id] = now_s, event.data
            if event.data.seconds_per_job is not None and not self._job_s:
                self._job_s.append(event.data.seconds_per_job)
        elif event.terminal:
            self._ended_s.append(now_s)
            if isinstance(event, JobCompleted) and event.data.timings.total is not None:
                self._job_s.append(event.data.timings.total)

    def workers(self, now_s: float) -> dict[str, Worker]:
        """Return what each worker said last, by its id: those that are there still."""
        return {
            name: data
            for name, (said_s, data) in sorted(self._workers.items())
            if data.state != "stopped" and said_s >= now_s - SILENT_S
        }

    def pace(self, now_s: float) -> PacePart:
        """Return how fast jobs ended in the last five minutes, or since listening began."""
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
    """Everything that was looked at. Times are of the same clock as those of ``ObservedEvents``.

    Attributes:
        depths: of queues, by name.
        tiers: the tiers that requests are sent on to; None: they are not.
        asked_s: when the workers were first asked to announce themselves; None: they were not.
        monitored: None: there is no management API to ask.
    """

    broker: str
    version: str | None
    limit: int
    depths: Mapping[str, QueueDepth | None]
    tiers: tuple[str, ...] | None = None
    asked_s: float | None = None
    monitored: RequestQueue | None
    heard: ObservedEvents
    now_s: float


def status_of(seen: StatusInputs, notes: Iterable[str] = ()) -> StatusReport:
    """Put together what follows from it."""
    requests = seen.depths[GENERATE] or QueueDepth(0, 0)
    limit, limit_from = _limit(seen)
    tiers = _tiers(seen)
    if tiers is not None:
        # The broker's figures are of one queue. A worker's prefetch is shared out among several then, and an ack there
        # may be of a request that was sent on: what the workers say counts.
        seen = replace(seen, monitored=None)
    workers = _workers(seen)
    pace = _pace(seen)
    prefetch = _sum_of_prefetch(seen, workers, requests.consumers)
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
        eta_s=eta_s(requests.ready, pace, prefetch),
        notes=(*notes, *_unattended(seen, tiers or ())),
    )


def eta_s(ready: int, pace: PacePart, prefetch: int | None) -> float | None:
    """Return the seconds until ``ready`` messages are done, as far as that can be known.

    By seconds per job over all workers where both are known: it holds for short samples. Else by the rate.
    """
    if ready == 0:
        return 0.0
    if pace.job_s is not None and prefetch:
        return round(ready * pace.job_s / prefetch, 1)
    return round(60 * ready / pace.jobs_a_minute, 1) if pace.jobs_a_minute else None


def _tiers(seen: StatusInputs) -> tuple[TierQueuePart, ...] | None:
    if seen.tiers is None:
        return None
    waiting = ((tier, _ready(seen, tier_queue(tier))) for tier in seen.tiers)
    return tuple(TierQueuePart(tier=tier, ready=ready) for tier, ready in waiting if ready)


def _unattended(seen: StatusInputs, tiers: Iterable[TierQueuePart]) -> Iterator[str]:
    """Say where requests wait for cards of which none answered, once all had time to."""
    if seen.asked_s is None or seen.now_s < seen.asked_s + ANSWERED_S:
        return
    there = {worker.tier for worker in seen.heard.workers(seen.now_s).values() if worker.state != "draining"}
    for part in tiers:
        if part.tier not in there:
            yield (
                f"{part.ready:,} wait in {tier_queue(part.tier)}, and no worker of {part.tier} answered: start one, or "
                "after a minute others with ACESTEP_ROUTE_BY_TIER take them, within their own limits"
            )


def _workers(seen: StatusInputs) -> tuple[WorkerPart, ...]:
    """Those that consume, by the broker's word, with what they said of themselves. Else those that said something."""
    told = seen.heard.workers(seen.now_s)
    if seen.monitored is None:
        return tuple(map(_told, told.values()))
    return tuple(
        (_told(told[each.worker_id]) if each.worker_id in told else WorkerPart(worker_id=each.worker_id)).model_copy(
            update={"prefetch": each.prefetch}
        )
        for each in seen.monitored.consumers
    )


def _told(data: Worker) -> WorkerPart:
    return WorkerPart(
        worker_id=data.worker_id,
        state=data.state,
        prefetch=data.prefetch,
        in_hand=data.in_hand,
        tier=data.tier,
        vram_gb=data.vram_gb,
        models=data.models,
    )


def _pace(seen: StatusInputs) -> PacePart:
    """The broker counts all acks; events are heard only since somebody listens."""
    pace = seen.heard.pace(seen.now_s)
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
    """The broker's count; else the workers' own, where nobody is missing."""
    if seen.monitored is not None:
        return seen.monitored.unacked, "broker"
    if not workers or _taking(workers) < consumers:
        return None, None
    return sum(worker.in_hand or 0 for worker in workers), "workers"


def _taking(workers: tuple[WorkerPart, ...]) -> int:
    """Workers that consume; one that drains still has jobs in hand, and no consumer any more."""
    return sum(worker.state != "draining" for worker in workers)


def _sum_of_prefetch(seen: StatusInputs, workers: tuple[WorkerPart, ...], consumers: int) -> int | None:
    """None where a worker's prefetch is not known, or there are consumers that nobody told of."""
    known = [worker.prefetch for worker in workers if worker.prefetch is not None]
    complete = seen.monitored is not None or len(workers) >= consumers
    return sum(known) if complete and len(known) == len(workers) else None


def _ready(seen: StatusInputs, queue: str) -> int:
    depth = seen.depths.get(queue)
    return depth.ready if depth else 0
