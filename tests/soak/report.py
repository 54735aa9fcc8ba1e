# SPDX-License-Identifier: Apache-2.0
"""The figures of a soak, for people and for a file."""

from __future__ import annotations

import json
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from tests.soak.audit import ENDS, Evidence, Finding
from tests.soak.load import Sort

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_SHOWN_IDS = 20
_LEARNED = 50


def figures(evidence: Evidence, faults: Mapping[str, int], lost_by_subscriber: int) -> dict[str, Any]:
    """Return what is worth telling, as JSON."""
    submissions = evidence.submissions.values()
    outcomes = Counter(evidence.outcomes[task_id] for task_id in evidence.accepted if task_id in evidence.outcomes)
    told = [end for ends in evidence.ends.values() for end in ends]
    starts = Counter(event.task_id for event in evidence.events if event.state == "started")
    return {
        "submitted": len(submissions),
        "accepted": len(evidence.accepted),
        "refused (queue full)": sum(not each.confirmed and not each.unknown for each in submissions),
        "fate of a publish unknown, sent again": sum(each.unknown for each in submissions),
        **{state: outcomes[state] for state in ENDS},
        "failed though nothing was wrong with it": sum(
            evidence.outcomes.get(each.task_id) == "failed" and each.sort is not Sort.DEADLY for each in submissions
        ),
        "songs checked in the bucket": sum(
            len(ends[0].data["audios"]) for ends in evidence.ends.values() if ends[0].state == "completed"
        ),
        "started again after a loss": sum(count - 1 for count in starts.values()),
        "terminal events told again": len(told) - len({(end.task_id, end.body) for end in told}),
        "started or progress told after the end": _after_the_end(evidence),
        "without an id, and done twice": sum(
            len({end.cloud_event["data"]["task_id"] for end in ends}) > 1
            for task_id, ends in evidence.ends.items()
            if evidence.sort_of(task_id) is Sort.WITHOUT_ID
        ),
        "id used again after a stored song of a cancelled job": sum(each.song_left for each in submissions),
        "dead letters": len(evidence.dead),
        "longest job, s": round(_longest_s(evidence), 1),
        "median error of the estimates after 50 jobs, %": _estimate_error(evidence),
        "subscriber's connections lost": lost_by_subscriber,
        **{f"fault: {kind}": count for kind, count in sorted(faults.items())},
        **{f"worker left with {status}": times for status, times in sorted(evidence.exits.items())},
    }


def _estimate_error(evidence: Evidence) -> float | None:
    """Compare what the start of a job announced with what the job took; per cent of the latter."""
    expected: dict[tuple[str, str], float] = {}
    errors = []
    for event in evidence.events:
        key = event.task_id, event.cloud_event["source"]
        if event.state == "started" and event.data["expected_s"] is not None:
            expected[key] = event.data["expected_s"]
        elif event.state == "completed" and key in expected and event.data["timings"]["total"]:
            took = event.data["timings"]["total"]
            errors.append(abs(expected.pop(key) - took) / took)
    return round(100 * median(errors[_LEARNED:]), 1) if len(errors) > _LEARNED else None


def as_table(title: str, numbers: Mapping[str, Any]) -> Table:
    """Return the figures as a table."""
    table = Table(box=box.SIMPLE, title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in numbers.items():
        table.add_row(name, str(value))
    return table


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings, a few ids each."""
    return [
        f"{finding.rule}: {len(finding.ids)}\n    " + "\n    ".join(finding.ids[:_SHOWN_IDS]) for finding in findings
    ]


def keep(folder: Path, evidence: Evidence, numbers: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """Write down all that was seen: one file for the figures, one line an event, one line a request."""
    summary = {"figures": numbers, "findings": {finding.rule: finding.ids for finding in findings}}
    (folder / "figures.json").write_text(json.dumps(summary, indent=1))
    with (folder / "events.jsonl").open("w") as file:
        for event in evidence.events:
            file.write(json.dumps({"at": event.at, "event": event.cloud_event}) + "\n")
    with (folder / "requests.jsonl").open("w") as file:
        for each in evidence.submissions.values():
            file.write(json.dumps(vars(each)) + "\n")


def _after_the_end(evidence: Evidence) -> int:
    """Where a worker goes on that the broker took for dead, the one that took over may have ended the job before."""
    ended: set[str] = set()
    late = 0
    for event in evidence.events:
        late += event.task_id in ended and not event.terminal
        if event.terminal:
            ended.add(event.task_id)
    return late


def _longest_s(evidence: Evidence) -> float:
    """From a request's first publish to its first terminal event."""
    return max(
        (
            ends[0].at - evidence.submissions[task_id].sent_at
            for task_id, ends in evidence.ends.items()
            if task_id in evidence.submissions
        ),
        default=0.0,
    )
