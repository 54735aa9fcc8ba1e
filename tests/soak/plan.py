# SPDX-License-Identifier: Apache-2.0
"""Which fault happens when, to what, for how long: drawn from a seed, the same for the same seed. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

WORKER_SLOTS = 2
FIRST_S = 4.0
# A broker is back after about six seconds; faults that begin meanwhile would only hit its absence.
BROKER_RETURNS_S = 10.0


class Kind(StrEnum):
    """What breaks. The part before the dash is the wire or the process that it happens to."""

    WORKER_KILLED = "worker-killed"
    WORKER_STOPPED = "worker-stopped"
    WORKER_HURRIED = "worker-stopped-at-once"
    ENGINE_KILLED = "engine-killed"
    BROKER_RESTARTED = "broker-restarted"
    BROKER_KILLED = "broker-killed"
    CONNECTIONS_CLOSED = "broker-closes-connections"
    AMQP_CUT = "amqp-cut"
    AMQP_CUT_WITHIN = "amqp-cut-within-a-frame"
    AMQP_STALLED = "amqp-stalled"
    AMQP_HALF_OPEN = "amqp-half-open"
    AMQP_SLOW = "amqp-slow"
    AMQP_REFUSED = "amqp-refused"
    S3_CUT = "s3-cut"
    S3_CUT_WITHIN = "s3-cut-within-a-body"
    S3_HANGS = "s3-hangs"
    S3_SLOW = "s3-slow"
    S3_REFUSED = "s3-refused"
    S3_ERRORS = "s3-answers-503"
    S3_ANSWERS_LOST = "s3-answers-lost"
    S3_ANSWERS_LATE = "s3-answers-late"

    @property
    def target(self) -> str:
        """What it happens to: ``worker``, ``engine``, ``broker``, ``amqp`` or ``s3``."""
        return self.partition("-")[0]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``slot`` is the worker whose wires it touches; None for the broker, which is everybody's."""

    at_s: float
    kind: Kind
    slot: int | None
    lasts_s: float
    dose: float
    """0 to 1: where a cut falls, how slow a link is, how many requests fail."""

    def __str__(self) -> str:
        whose = "" if self.slot is None else f" on worker {self.slot + 1}"
        length = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind}{whose}{length}"


# How many cards of each kind are in the deck, and how long it lasts: the shortest and the longest, seconds.
_DECK: dict[Kind, tuple[int, float, float]] = {
    Kind.WORKER_KILLED: (3, 0.2, 3),
    Kind.WORKER_STOPPED: (2, 0.2, 3),
    Kind.WORKER_HURRIED: (1, 0.5, 3),
    Kind.ENGINE_KILLED: (2, 0, 0),
    Kind.BROKER_RESTARTED: (1, 0, 2),
    Kind.BROKER_KILLED: (1, 0, 2),
    Kind.CONNECTIONS_CLOSED: (2, 0, 0),
    Kind.AMQP_CUT: (2, 0, 0),
    Kind.AMQP_CUT_WITHIN: (3, 2, 4),
    Kind.AMQP_STALLED: (2, 1, 8),
    Kind.AMQP_HALF_OPEN: (1, 25, 40),
    Kind.AMQP_SLOW: (1, 3, 10),
    Kind.AMQP_REFUSED: (1, 1, 6),
    Kind.S3_CUT: (2, 0, 0),
    Kind.S3_CUT_WITHIN: (2, 2, 4),
    Kind.S3_HANGS: (1, 2, 40),
    Kind.S3_SLOW: (1, 3, 10),
    Kind.S3_REFUSED: (1, 1, 20),
    Kind.S3_ERRORS: (2, 2, 15),
    Kind.S3_ANSWERS_LOST: (2, 2, 8),
    Kind.S3_ANSWERS_LATE: (2, 4, 12),
}


def plan(seed: int, length_s: float, pause_s: float) -> tuple[Fault, ...]:
    """Return the faults of a run of ``length_s`` seconds, on average ``pause_s`` apart; all are over by its end.

    Kinds are dealt from a shuffled deck, so that a run of two minutes or more has nearly all of them. One wire has one
    fault at a time; different ones have theirs side by side.
    """
    chance = random.Random(seed)  # noqa: S311 - a plan that can be repeated, no secret
    deck: list[Kind] = []
    busy_until: dict[tuple[str, int | None], float] = {}
    faults: list[Fault] = []
    at_s = FIRST_S
    while at_s < length_s:
        deck = deck or _shuffled(chance)
        fault = _draw(chance, deck.pop(), at_s, length_s)
        where = (fault.kind.target, fault.slot)
        if busy_until.get(where, 0) <= at_s and busy_until.get(("broker", None), 0) <= at_s:
            busy_until[where] = at_s + max(fault.lasts_s, 1) + BROKER_RETURNS_S * (fault.slot is None)
            faults.append(fault)
        at_s += chance.expovariate(1 / pause_s)
    return tuple(faults)


def _shuffled(chance: random.Random) -> list[Kind]:
    deck = [kind for kind, (cards, _, _) in _DECK.items() for _ in range(cards)]
    chance.shuffle(deck)
    return deck


def _draw(chance: random.Random, kind: Kind, at_s: float, length_s: float) -> Fault:
    _, shortest_s, longest_s = _DECK[kind]
    slot = chance.randrange(WORKER_SLOTS)
    lasts_s = min(chance.uniform(shortest_s, longest_s), length_s - at_s)
    dose = chance.random()
    return Fault(round(at_s, 2), kind, None if kind.target == "broker" else slot, round(lasts_s, 2), dose)
