# SPDX-License-Identifier: Apache-2.0
"""``status`` for eyes."""

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from acestep_consumer.commands.status.report import PacePart, StatusReport, TierQueuePart, WorkerPart
from acestep_consumer.commands.terminal import UNKNOWN, number, seconds

_FULL, _NEARLY_FULL = 1.0, 0.8


def picture(status: StatusReport) -> RenderableType:
    """Return the answer as a picture for a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(status):
        table.add_row(name, text)
    notes = (Text(f"- {note}", style="yellow") for note in status.notes)
    return Group(table, *([_workers(status.workers)] if status.workers else []), *notes)


def _rows(status: StatusReport) -> Iterator[tuple[str, Text | str]]:
    queue = status.queue
    yield "broker", f"RabbitMQ {status.version or ''} at {status.broker}, {status.time.astimezone():%H:%M:%S}"
    yield "waiting", _waiting(queue.ready, queue.limit)
    if status.tiers is not None:
        yield "sent on, waiting", _sent_on(status.tiers)
    yield "in workers' hands", _in_hand(status)
    yield "workers", _count(status)
    bound = UNKNOWN if queue.bound is None else f"{queue.bound:,}"
    sent_on = "" if status.tiers is None else f"; {queue.limit:,} more for each tier that is sent something"
    yield "accepted at most", f"{bound} = limit {queue.limit:,} (from the {queue.limit_from}) + all prefetch{sent_on}"
    yield "throughput", _throughput(status.pace)
    yield "queue empty in", _eta(status)
    dead = status.dead_letters
    yield "dead letters", Text(f"{dead:,}; see acestep-consumer dead list", style="yellow") if dead else "0"
    yield "unrouted events", f"{status.unrouted_events:,} kept"


def _waiting(ready: int, limit: int) -> Text:
    fullness = ready / limit if limit else _FULL
    style = "bold red" if fullness >= _FULL else "yellow" if fullness >= _NEARLY_FULL else "green"
    refused = "; producers are refused" if fullness >= _FULL else ""
    return Text(f"{ready:,} of {limit:,}{refused}", style=style)


def _sent_on(tiers: tuple[TierQueuePart, ...]) -> str:
    return ", ".join(f"{part.ready:,} for {part.tier}" for part in tiers) or "0"


def _in_hand(status: StatusReport) -> str:
    """The broker's count stands alone; what workers say of themselves is named as that."""
    queue, told = status.queue, [each.in_hand for each in status.workers if each.in_hand is not None]
    if queue.unacked is None:
        answered = f"{len(told)} answered for {queue.consumers} consumer{'' if queue.consumers == 1 else 's'}"
        return f"at least {sum(told):,} ({answered})" if told else UNKNOWN
    return f"{queue.unacked:,}" + " (as the workers say)" * (queue.unacked_from == "workers")


def _count(status: StatusReport) -> Text:
    consumers = status.queue.consumers
    if not consumers:
        return Text("none: nobody takes requests", style="bold red" if status.queue.ready else "yellow")
    named = len(status.workers)
    return Text(f"{named} seen, " * bool(named) + f"{consumers} consumer{'' if consumers == 1 else 's'}")


def _throughput(pace: PacePart) -> str:
    if pace.jobs_a_minute is None:
        return f"{UNKNOWN} (no job ended in the {seconds(pace.heard_s)} of listening)"
    source = "the broker's last minutes" if pace.source == "broker" else f"{seconds(pace.heard_s)} of listening"
    job = "" if pace.job_s is None else f", {seconds(pace.job_s)} a job"
    return f"{number(pace.jobs_a_minute)} jobs a minute{job} (from {source})"


def _eta(status: StatusReport) -> str:
    if status.eta_s == 0:
        return "now"
    return "about " + seconds(status.eta_s) if status.eta_s is not None else UNKNOWN


def _workers(workers: tuple[WorkerPart, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("worker", "state", "in hand", "prefetch", "tier", "VRAM GB", "models"):
        table.add_column(column, style="cyan" if column == "worker" else "", overflow="fold")
    for each in workers:
        vram = UNKNOWN if each.vram_gb is None else f"{each.vram_gb:.1f}"
        models = ", ".join(each.models) or UNKNOWN
        hands = number(each.in_hand), number(each.prefetch)
        table.add_row(each.worker_id, each.state or UNKNOWN, *hands, each.tier or UNKNOWN, vram, models)
    return table
