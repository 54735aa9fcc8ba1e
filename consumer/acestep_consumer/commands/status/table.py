# SPDX-License-Identifier: Apache-2.0
"""Formats the report of ``status`` for a terminal."""

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from acestep_consumer.commands.status.report import PacePart, StatusReport, TierQueuePart, WorkerPart
from acestep_consumer.commands.terminal import UNKNOWN, about, bullet_list, number, plural, seconds

_FULL, _NEARLY_FULL = 1.0, 0.8


def table(status: StatusReport) -> RenderableType:
    """Return the report as tables, with notes below."""
    summary = Table(box=None, show_header=False, pad_edge=False)
    summary.add_column(style="cyan", no_wrap=True)
    summary.add_column(overflow="fold")
    for name, text in _rows(status):
        summary.add_row(name, text)
    parts: list[RenderableType] = [summary]
    if status.workers:
        parts.append(_workers(status.workers))
    if status.notes:
        parts.append(bullet_list(status.notes))
    return Group(*parts)


def _rows(status: StatusReport) -> Iterator[tuple[str, Text | str]]:
    queue = status.queue
    yield "broker", f"RabbitMQ {status.version or ''} at {status.broker}, {status.time.astimezone():%H:%M:%S}"
    yield "waiting", _waiting(queue.ready, queue.limit)
    if status.tiers is not None:
        yield "forwarded", _forwarded(status.tiers)
    yield "in progress", _in_progress(status)
    yield "workers", _count(status)
    yield "capacity", _capacity(status)
    yield "throughput", _throughput(status.pace)
    yield "backlog", _backlog(status)
    dead = status.dead_letters
    yield "dead letters", Text(f"{dead:,}; see acestep-consumer dead list", style="yellow") if dead else "0"
    unrouted = status.unrouted_events
    yield "unrouted events", f"{unrouted:,}" + ", kept; harmless: no subscriber was connected" * bool(unrouted)


def _waiting(ready: int, limit: int) -> Text:
    fullness = ready / limit if limit else _FULL
    style = "bold red" if fullness >= _FULL else "yellow" if fullness >= _NEARLY_FULL else "green"
    full = "; full, further requests are rejected" if fullness >= _FULL else ""
    return Text(f"{ready:,} of {limit:,}{full}", style=style)


def _forwarded(tiers: tuple[TierQueuePart, ...]) -> str:
    return ", ".join(f"{part.ready:,} waiting for {part.tier}" for part in tiers) or "none waiting"


def _in_progress(status: StatusReport) -> str:
    """Format the broker's count, or that of the workers, which is named as such."""
    queue, reported = status.queue, [each.in_hand for each in status.workers if each.in_hand is not None]
    if queue.unacked is None:
        answered = f"reported by {plural(len(reported), 'worker')} of {plural(queue.consumers, 'consumer')}"
        return f"at least {sum(reported):,} ({answered})" if reported else UNKNOWN
    return f"{queue.unacked:,}" + " (reported by workers)" * (queue.unacked_from == "workers")


def _count(status: StatusReport) -> Text:
    consumers = status.queue.consumers
    responding = f"{len(status.workers)} responding, " * bool(status.workers)
    if not consumers and any(worker.state == "ready" for worker in status.workers):
        return Text(f"{responding}none takes requests now: busy, or paused", style="yellow")
    if not consumers:
        return Text("none: no requests are taken", style="bold red" if status.queue.ready else "yellow")
    return Text(f"{responding}{plural(consumers, 'consumer')} on the queue")


def _capacity(status: StatusReport) -> str:
    queue = status.queue
    source = "broker" if queue.limit_from == "broker" else "ACESTEP_QUEUE_MAXSIZE"
    limit = f"queue limit {queue.limit:,} (from {'the ' * (source == 'broker')}{source})"
    prefetch = UNKNOWN if queue.bound is None else f"{queue.bound - queue.limit:,}"
    bound = UNKNOWN if queue.bound is None else f"{queue.bound:,}"
    tiers = "" if status.tiers is None else f"; {queue.limit:,} more for each tier"
    return f"{bound} = {limit} + prefetch {prefetch}{tiers}"


def _throughput(pace: PacePart) -> str:
    if pace.jobs_a_minute is None:
        return f"{UNKNOWN} (no job ended in {seconds(pace.heard_s)})"
    period = "in the last minutes" if pace.source == "broker" else f"in {seconds(pace.heard_s)}"
    job = "" if pace.job_s is None else f", {seconds(pace.job_s)} per job"
    return f"{number(pace.jobs_a_minute)} jobs per minute {period}{job}"


def _backlog(status: StatusReport) -> str:
    if status.eta_s == 0:
        return "none"
    return about(status.eta_s, status.eta_most_s)


def _workers(workers: tuple[WorkerPart, ...]) -> Table:
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("worker", "state", "tier", "GB", "jobs", "models"):
        found.add_column(column, style="cyan" if column == "worker" else "", overflow="fold")
    for each in workers:
        vram = UNKNOWN if each.vram_gb is None else f"{each.vram_gb:.1f}"
        jobs = "\n".join((f"{number(each.in_hand)} of {number(each.prefetch)}", *_stages(each)))
        # One model a line: a name that is broken in the middle cannot be copied.
        models = "\n".join(each.models) or UNKNOWN
        found.add_row(each.worker_id, each.state or UNKNOWN, each.tier or UNKNOWN, vram, jobs, models)
    return found


def _stages(worker: WorkerPart) -> Iterator[str]:
    """Yield the jobs of each stage that has some, with the stage's limit."""
    limits = worker.stage_limits or {}
    for stage, jobs in (worker.stages or {}).items():
        if jobs:
            yield f"{stage} {jobs}" if (limit := limits.get(stage)) is None else f"{stage} {jobs} of {limit}"
