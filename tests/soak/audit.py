# SPDX-License-Identifier: Apache-2.0
"""What must hold when all is over, whatever broke meanwhile. Pure: evidence in, findings out."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tests.soak.load import NAME, Sort, Submission
from tests.support.event_recorder import RecordedEvent

COMPLETED, FAILED, REJECTED, CANCELLED, EXPIRED = "completed", "failed", "rejected", "cancelled", "expired"
ENDS = (COMPLETED, FAILED, REJECTED, CANCELLED, EXPIRED)
STARTED = "started"
ENGINE_DIED = "engine_crashed"
LEFT_WELL = 0
KILLED = -9
# A worker that cannot reach its storage when it starts says so and leaves.
REFUSED_TO_START = 2

_MAY_END = {
    Sort.SONG: {COMPLETED},
    Sort.TWO_SONGS: {COMPLETED},
    Sort.LARGE: {COMPLETED},
    Sort.TWICE: {COMPLETED},
    Sort.INVALID: {REJECTED},
    Sort.DEADLY: {FAILED},
    Sort.EXPIRING: {COMPLETED, EXPIRED},
    Sort.CANCELLED: {COMPLETED, CANCELLED},
    Sort.WITHOUT_ID: {COMPLETED},
    Sort.REUSED_ID: {COMPLETED, CANCELLED},
    Sort.WORSE_DUPLICATE: {COMPLETED, REJECTED, EXPIRED},
    Sort.AUDIO_DELETED: {COMPLETED},
    Sort.CUT_OFF: {COMPLETED, EXPIRED},
}
# One of their messages may be given up, though the songs are there.
_MAY_BE_DEAD = {Sort.EXPIRING, Sort.WORSE_DUPLICATE, Sort.CUT_OFF}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be. ``ids`` are the tasks, or whatever else it is about."""

    rule: str
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen.

    Attributes:
        submissions: by task id.
        events: all events of jobs.
        wrongs: by task id, what the bucket lacks of a completed job's promises.
        dead: the message ids of all dead letters.
        ready: requests, and notices of given up ones, that are left on the broker.
        unacked: messages that some worker still held when all were idle.
        leftovers: files in scratch folders after the workers had left.
        exits: how often workers ended with which status.
    """

    submissions: Mapping[str, Submission]
    events: Sequence[RecordedEvent]
    wrongs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dead: Sequence[str] = ()
    ready: int = 0
    unacked: int = 0
    leftovers: Sequence[str] = ()
    exits: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def ends(self) -> dict[str, list[RecordedEvent]]:
        """Terminal events by task id, in the order in which they came."""
        ends: dict[str, list[RecordedEvent]] = defaultdict(list)
        for event in self.events:
            if event.terminal:
                ends[event.task_id].append(event)
        return ends

    @cached_property
    def outcomes(self) -> dict[str, str]:
        """How each task ended that did: ``completed`` if it ever completed, else its last end."""
        return {
            task_id: COMPLETED if any(end.state == COMPLETED for end in ends) else ends[-1].state
            for task_id, ends in self.ends.items()
        }

    def sort_of(self, task_id: str) -> Sort | None:
        """What the request was like; None for a task that nobody sent."""
        submission = self.submissions.get(task_id)
        return submission.sort if submission else None

    @property
    def accepted(self) -> list[str]:
        """The tasks that the broker confirmed."""
        return [task_id for task_id, submission in self.submissions.items() if submission.confirmed]


def names_of(events: Iterable[RecordedEvent], dead: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Return the submission of each id that a worker gave to a message without one.

    Its name is a word of the prompt, which the songs' event and the dead letter's body (``dead``: id and body) have.
    """
    bodies = [(task_id, body) for task_id, body in dead]
    bodies += [(event.task_id, event.body) for event in events if event.state == COMPLETED]
    found = ((task_id, re.search(rb"\b" + NAME.encode() + rb"(soak-\d+)", body)) for task_id, body in bodies)
    return {task_id: match[1].decode() for task_id, match in found if match}


def audit(evidence: Evidence) -> list[Finding]:
    """Return all that must not be; nothing, when every promise was kept."""
    rules = {
        "accepted, and never ended": _never_ended,
        "started, and never ended": _started_and_never_ended,
        "refused, and run all the same": _refused_and_run,
        "ended, and nobody sent it": _unknown,
        "ended in more than one way": _two_ends,
        "ended as it must not": _wrong_end,
        "lost its songs to another message with its id": _songs_lost,
        "completed, and not in the bucket as the event says": lambda seen: seen.wrongs,
        "failed or rejected, and no dead letter": _no_dead_letter,
        "completed, and a dead letter": _completed_and_dead,
        "messages left on the broker": lambda seen: _count(seen.ready),
        "messages that nobody settled": lambda seen: _count(seen.unacked),
        "left in a scratch folder": lambda seen: seen.leftovers,
        "a worker left in a way that it must not": _bad_exits,
    }
    found = ((rule, tuple(broken(evidence))) for rule, broken in rules.items())
    return [Finding(rule, ids) for rule, ids in found if ids]


def _never_ended(seen: Evidence) -> Iterable[str]:
    return (task_id for task_id in seen.accepted if task_id not in seen.ends)


def _started_and_never_ended(seen: Evidence) -> Iterable[str]:
    """So it is with the earlier ids of a message that gets another one each time a worker dies over it."""
    started = dict.fromkeys(event.task_id for event in seen.events if event.state == STARTED)
    return (task_id for task_id in started if task_id not in seen.ends)


def _refused_and_run(seen: Evidence) -> Iterable[str]:
    return (task_id for task_id, each in seen.submissions.items() if not each.copies and task_id in seen.ends)


def _unknown(seen: Evidence) -> Iterable[str]:
    return (task_id for task_id in seen.ends if task_id not in seen.submissions)


def _two_ends(seen: Evidence) -> Iterator[str]:
    """One message has one end, told in the same bytes each time. Only a task that failed may be sent again.

    To another message with its id, a finished task is told with one warning more. Deleted songs are made again.
    """
    for task_id, ends in seen.ends.items():
        submission = seen.submissions.get(task_id)
        contents = {(end.state, _without_warnings(end)) for end in ends}
        songs = {body for state, body in contents if state == COMPLETED}
        if submission is None:
            continue
        most = _songs_at_most(submission)
        if len(songs) > most or len(contents) > max(most, submission.copies):
            yield f"{task_id} ({', '.join(end.state for end in ends)})"


def _songs_at_most(submission: Submission) -> int:
    match submission.sort:
        case Sort.AUDIO_DELETED:
            return max(1, submission.copies)
        case Sort.WITHOUT_ID:
            # A worker may be cut off after the copy's confirm and before the original's ack: another id is given then.
            return 1 + max(1, submission.copies)
    return 1


def _without_warnings(end: RecordedEvent) -> str:
    data = {name: value for name, value in end.data.items() if name != "warnings"}
    return json.dumps({**end.cloud_event, "data": data}, sort_keys=True)


def _songs_lost(seen: Evidence) -> Iterator[str]:
    for task_id, outcome in seen.outcomes.items():
        submission = seen.submissions.get(task_id)
        unlucky = any(_killed_too_often(end) for end in seen.ends[task_id])
        if submission and submission.songs_owed and outcome != COMPLETED and not unlucky:
            yield f"{task_id} ({outcome})"


def _killed_too_often(end: RecordedEvent) -> bool:
    """Engines are killed on purpose, so a job may run out of tries: that alone is nobody's mistake."""
    return end.state == FAILED and end.data["error"]["code"] == ENGINE_DIED


def _wrong_end(seen: Evidence) -> Iterator[str]:
    for task_id, ends in seen.ends.items():
        sort = seen.sort_of(task_id)
        for end in ends if sort else ():
            assert sort is not None
            if end.state not in _MAY_END[sort] and not _killed_too_often(end):
                error = end.data.get("error") or {}
                yield f"{task_id} ({sort}: {end.state} {error.get('code', '')} {error.get('message', '')})"


def _no_dead_letter(seen: Evidence) -> Iterable[str]:
    dead = set(seen.dead)
    return (task_id for task_id, end in seen.outcomes.items() if end in (FAILED, REJECTED) and task_id not in dead)


def _completed_and_dead(seen: Evidence) -> Iterable[str]:
    """Not so those with an expiration: when the broker loses sight of a worker, it may give up what is being sung."""
    only_completed = {
        task_id
        for task_id, ends in seen.ends.items()
        if {end.state for end in ends} == {COMPLETED} and seen.sort_of(task_id) not in _MAY_BE_DEAD
    }
    return sorted(only_completed & set(seen.dead))


def _count(number: int) -> tuple[str, ...]:
    return (str(number),) if number else ()


def _bad_exits(seen: Evidence) -> Iterator[str]:
    for status, times in seen.exits.items():
        if status not in (LEFT_WELL, KILLED, REFUSED_TO_START):
            yield f"status {status}: {times} times"
