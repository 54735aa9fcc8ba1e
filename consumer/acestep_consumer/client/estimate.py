# SPDX-License-Identifier: Apache-2.0
"""What a request that was submitted just now can expect: its place, and when its songs are there. Pure.

Jobs run side by side in a worker: ``prefetch`` of them, on one card. ``seconds_per_job`` is what a job took from the
broker's delivery to its end, beside the others. So a busy worker ends ``prefetch / seconds_per_job`` jobs a second
(Little's law); that the jobs share a card is in the seconds already, and is not counted again.

Only ``acestep.generate`` is looked at. Where workers send requests on to larger cards (``ACESTEP_ROUTE_BY_TIER``), such
a request waits a second time, in the queue of a tier: its place is that of the first wait, and its seconds leave the
second one out.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import fmean

from acestep_schemas.events import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEstimate:
    """What is known of a request that was submitted just now. None: not known; ``note`` says why.

    Attributes:
        position: requests that wait in the queue, this one among them: 1 is next, 0 is in a worker's hands already.
        in_hand: jobs in the hands of the workers that answered.
        workers: how many workers answered that take requests.
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


def outlook_of(
    depth: RequestQueueDepth | None, answers: Collection[Worker], heard_s: float | None, trouble: str | None = None
) -> QueueEstimate:
    """Put together what follows.

    Args:
        depth: the queue after the request came to it; None: it could not be asked.
        answers: what each worker said of itself, by the latest.
        heard_s: the seconds of a job that this client has heard of, for workers that have none of their own.
        trouble: why something could not be asked.
    """
    taking = [worker for worker in answers if worker.state == "ready" and worker.prefetch > 0]
    expected_s = None if depth is None or not depth.consumers else expected(depth.ready, taking, heard_s)
    return QueueEstimate(
        position=None if depth is None else depth.ready,
        in_hand=sum(worker.in_hand for worker in answers) if answers else None,
        workers=len(taking),
        expected_s=None if expected_s is None else round(expected_s, 1),
        note=_note(depth, len(taking), trouble, known=expected_s is not None),
    )


def expected(position: int, workers: Collection[Worker], heard_s: float | None) -> float | None:
    """Return the seconds until the job at ``position`` has ended; None: no worker is known, or none has a figure.

    It begins once those before it have; whoever has a free hand takes one at once, and each further one takes a job's
    end. The jobs in hand are somewhere on their way, so the first of these ends comes after half the usual distance.
    """
    known = [worker.seconds_per_job for worker in workers if worker.seconds_per_job]
    usual_s = fmean(known) if known else heard_s
    if not workers or not usual_s:
        return None
    ends_a_second = sum(worker.prefetch / (worker.seconds_per_job or usual_s) for worker in workers)
    begins_after = max(0, position - _free_hands(workers))
    waits_s = (begins_after - 0.5) / ends_a_second if begins_after else 0.0
    # Whose hands it falls into is a matter of who is faster, so the mean is weighted with that.
    return waits_s + sum(worker.prefetch for worker in workers) / ends_a_second


def _free_hands(workers: Iterable[Worker]) -> int:
    return sum(max(0, worker.prefetch - worker.in_hand) for worker in workers)


def _note(depth: RequestQueueDepth | None, workers: int, trouble: str | None, *, known: bool) -> str | None:
    if depth is None:
        return f"the queue could not be asked: {trouble or 'the broker did not answer in time'}"
    if not depth.consumers:
        return "no worker takes requests now: start one with `acestep-consumer run`"
    if trouble is not None:
        return f"the workers could not be asked: {trouble}"
    if not known:
        return "no worker has finished a job yet" if workers else "no worker answered in time"
    # A worker has several consumers while its prefetch changes, so this may be all of them.
    few = f"{workers} answered for {depth.consumers} consumers: whoever did not is not counted"
    return few if workers < depth.consumers else None
