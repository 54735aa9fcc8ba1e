# SPDX-License-Identifier: Apache-2.0
"""Formats the report of ``plan`` as tables."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from acestep_consumer.commands.plan.answer import FitPart, GpuPart, MemoryPart, PlanReport
from acestep_consumer.commands.plan.gpu import UNNAMED
from acestep_consumer.commands.terminal import bullet_list, plural, two_digits

Row = tuple[str, str]

_FITS = "GiB left beside one song of 300 s, and songs a minute of the workload below"
_FITS_INT8 = "The same with weights in int8 (ACESTEP_QUANTIZATION=int8)"


def show(plan: PlanReport, console: Console) -> None:
    """Print the report: the GPU, which models fit, the recommendation, notes."""
    if plan.card.vram_gb and plan.card.compute is None:
        # Before any figure: it would be taken for this GPU's.
        console.print(_whose_speed(plan.card), style="bold yellow", markup=False)
    console.print(_rows("GPU", _gpu(plan)))
    if plan.possible:
        console.print(_possible(_FITS, plan.possible))
    if plan.possible_int8:
        console.print(_possible(_FITS_INT8, plan.possible_int8))
    console.print(_rows("This workload", _workload(plan)))
    if plan.notes:
        console.print(bullet_list(plan.notes))


def _whose_speed(card: GpuPart) -> str:
    if card.found_by == "--vram" and card.name == UNNAMED:
        return f"No --card: all speeds below are those of an H200; a GPU of {card.vram_gb:g} GB is likely to be slower."
    return f"Unknown GPU: {card.name}. All speeds below are those of an H200; expect less."


def _rows(title: str, rows: Iterator[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _gpu(plan: PlanReport) -> Iterator[Row]:
    tier = plan.tier
    gpu = plan.card
    yield "GPU", f"{gpu.name}, {gpu.vram_gb:g} GB (from {gpu.found_by})" if gpu.vram_gb else "no GPU detected"
    yield "tier", f"{tier.name} of {tier.table_version}"
    yield "longest song", f"{tier.max_duration_s_with_lm} s with the LM, {tier.max_duration_s} s without"
    yield "largest batch", f"{tier.max_batch_with_lm} with the LM, {tier.max_batch} without"
    for other in plan.other_tiers:
        seconds = f"{other.max_duration_s_with_lm} s with the LM, {other.max_duration_s} s without"
        songs = f"batches of {other.max_batch_with_lm} and {other.max_batch}"
        yield "other tier table", f"not in force: {other.name} of {other.table_version}: {seconds}; {songs}"
    yield "models", ", ".join(f"{model.name} ({model.size})" for model in plan.models)
    yield "language model", _lm(plan)
    yield "weights", plan.quantization or "as published (bfloat16)"
    yield "offloading", _offload(plan)
    if plan.memory is not None:
        yield from _memory(plan.memory)


def _lm(plan: PlanReport) -> str:
    if plan.lm is None:
        return "none"
    lm = plan.lm
    backend = lm.backend if lm.backend_is_set or lm.backend == "pt" else f"{lm.backend} (if installed)"
    return f"{lm.model} on {backend}, {lm.memory_gib:g} GiB, {plural(lm.songs_at_once, 'song')} concurrently"


def _offload(plan: PlanReport) -> str:
    offload = plan.offload
    state = "off" if not offload.models else "on, DiT included" if offload.dit else "on, except the DiT"
    return f"{state}: {offload.because}"


def _memory(memory: MemoryPart) -> Iterator[Row]:
    shares = f"{memory.lm_gib:g} LM + {memory.renderer_gib:g} renderer + {memory.reserve_gib:g} reserve"
    yield "memory, GiB", f"{memory.card_gib:g} = {shares}; calculated, a worker measures at its start"
    work = f"{memory.renderer_working_gib:g} for a step or decode, {memory.renderer_song_gib:g} per song"
    graphs = f" and CUDA graphs ({memory.renderer_graphs_gib:g})" if memory.renderer_graphs_gib else ""
    yield "renderer, GiB", f"{memory.renderer_weights_gib:g} weights{graphs}, {work}"


def _possible(title: str, possible: tuple[FitPart, ...]) -> Table:
    """A row for each LM, a column for each DiT size: memory left, and songs per minute of the workload."""
    sizes = list(dict.fromkeys(part.dit for part in possible))
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("language model", style="cyan")
    for size in sizes:
        table.add_column(f"DiT {size}")
    for lm, backend in dict.fromkeys((part.lm, part.backend) for part in possible):
        # Transformers is many times slower, and is there because vLLM has no room.
        name = f"{lm}, on pt" if backend == "pt" else lm or "none"
        table.add_row(name, *(_fit(part) for part in possible if part.lm == lm))
    return table


def _fit(part: FitPart) -> str:
    if not part.fits:
        return f"[red]no, {-part.left_gib:.1f} short[/red]"
    rate = "" if part.songs_a_minute is None else f", {two_digits(part.songs_a_minute)} a minute"
    return f"{part.left_gib:.1f} left{rate}"


def _workload(plan: PlanReport) -> Iterator[Row]:
    work, workers, songs = plan.workload, plan.workers, plan.songs
    thinking = "thinking" if work.thinking else "no thinking"
    guided = ", guided" if work.guided else ""
    songs_asked = f"{plural(work.batch, 'song')} of {work.duration_s:g} s as {work.audio_format}"
    yield "each request", f"{songs_asked}, {thinking}, {work.model}, {work.steps} steps{guided}"
    now = "auto" if workers.set_now is None else str(workers.set_now)
    if plan.fits:
        number = f"ACESTEP_QUEUE_WORKERS={workers.recommended}"
        yield "concurrent jobs", f"{number} (now {now}; `auto` finds the number at run time)"
        planning = f"{workers.in_lm} in the LM, " if work.thinking else ""
        rest = f"{workers.elsewhere} fetching, encoding or uploading"
        yield "where they are", f"{planning}{workers.in_renderer} in the renderer, {rest}"
    yield "why not more", workers.because
    yield "basis", songs.rests_on
    yield "songs per minute", _rate(plan)


def _rate(plan: PlanReport) -> str:
    """Return the songs a minute, and whose they are."""
    rate = plan.songs.a_minute
    if rate is None:
        return "unknown"
    same = plan.card.compute == plan.card.bandwidth == 1
    whose = "calculated" if same else "scaled from an H200, not measured" if plan.card.compute else "on an H200"
    return f"about {two_digits(rate)} at best ({whose})"
