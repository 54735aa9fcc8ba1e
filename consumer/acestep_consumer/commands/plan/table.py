# SPDX-License-Identifier: Apache-2.0
"""``plan`` for eyes: the answer as tables."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from acestep_consumer.commands.plan.answer import PlanReport

Row = tuple[str, str]


def show(plan: PlanReport, console: Console) -> None:
    """Print it: the card, what fits, the advice, and what to know about it."""
    console.print(_rows("Card", _card(plan)))
    if plan.possible:
        console.print(_possible(plan))
    console.print(_rows("This workload", _workload(plan)))
    for note in plan.notes:
        console.print(f"- {note}", style="yellow", markup=False)


def _rows(title: str, rows: Iterator[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _card(plan: PlanReport) -> Iterator[Row]:
    tier = plan.tier
    yield "card", f"{plan.card.name}, {plan.card.vram_gb:g} GB (from {plan.card.found_by})"
    yield "tier", f"{tier.name} of table {tier.table_version}"
    yield "longest song", f"{tier.max_duration_s_with_lm} s with the LM, {tier.max_duration_s} s without"
    yield "largest batch", f"{tier.max_batch_with_lm} with the LM, {tier.max_batch} without"
    yield "models", ", ".join(f"{model.name} ({model.size})" for model in plan.models)
    yield "language model", _lm(plan)
    yield "offloading", _offload(plan)
    if plan.memory is not None:
        yield from _memory(plan)


def _lm(plan: PlanReport) -> str:
    if plan.lm is None:
        return "none"
    lm = plan.lm
    backend = lm.backend if lm.backend_is_set or lm.backend == "pt" else f"{lm.backend} (where it is installed)"
    return f"{lm.model} on {backend}, {lm.memory_gb:g} GB of memory, {lm.songs_at_once} songs at once"


def _offload(plan: PlanReport) -> str:
    offload = plan.offload
    what = "off" if not offload.models else "on, the DiT too" if offload.dit else "on, all but the DiT"
    return f"{what}: {offload.because}"


def _memory(plan: PlanReport) -> Iterator[Row]:
    memory = plan.memory
    assert memory is not None  # noqa: S101 - asked before
    shares = f"{memory.lm_gib:g} language model + {memory.renderer_gib:g} renderer + {memory.reserve_gib:g} reserve"
    yield "memory, GiB", f"{memory.card_gib:g} = {shares}"
    work = f"{memory.renderer_working_gib:g} step or decode, {memory.renderer_song_gib:g} a song"
    yield "renderer, GiB", f"{memory.renderer_weights_gib:g} weights, {work}"


def _possible(plan: PlanReport) -> Table:
    """What else would fit: a row for each LM, a column for each size of DiT."""
    sizes = list(dict.fromkeys(part.dit for part in plan.possible))
    table = Table(title="What fits", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("language model", style="cyan")
    for size in sizes:
        table.add_column(f"DiT {size}")
    for lm in dict.fromkeys(part.lm for part in plan.possible):
        table.add_row(lm or "none", *(_left(part.left_gib) for part in plan.possible if part.lm == lm))
    return table


def _left(gib: float) -> str:
    return f"{gib:.1f} GiB left" if gib >= 0 else f"[red]no, {-gib:.1f} GiB short[/red]"


def _workload(plan: PlanReport) -> Iterator[Row]:
    work, workers, songs = plan.workload, plan.workers, plan.songs
    thinking = "thinking" if work.thinking else "no thinking"
    guided = ", guided" if work.guided else ""
    count = "1 song" if work.batch == 1 else f"{work.batch} songs"
    what = f"{count} of {work.duration_s:g} s as {work.audio_format}, {thinking}"
    yield "each request", f"{what}, {work.model}, {work.steps} steps{guided}"
    now = "auto" if workers.set_now is None else str(workers.set_now)
    if plan.fits:
        yield "workers", f"ACESTEP_QUEUE_WORKERS={workers.recommended} (now {now}; `auto` finds the number by itself)"
        planning = f"{workers.in_lm} in the language model, " if work.thinking else ""
        rest = f"{workers.elsewhere} being fetched, encoded or stored"
        yield "their jobs", f"{planning}{workers.in_renderer} in the renderer, {rest}"
    yield "why", workers.because
    yield "songs a minute", "unknown" if songs.a_minute is None else f"{songs.a_minute:g} at best"
    yield "rests on", songs.rests_on
