# SPDX-License-Identifier: Apache-2.0
"""The renderer on a GPU: songs a minute by length, and how near a DiT step comes to the card's matrix peak.

    python -m tests.bench.bench_renderer_gpu [--cases 30x16,120x16,300x8,mixedx16] [--seconds 20] [--profile]

Full-size random weights, bfloat16; turbo with 8 steps, or ``--base`` with 50 and guidance. Songs are made as in the
worker: audio codes of each song's own (as the language model writes them), conditioned, packed, decoded, copied to RAM.
Side by side: the plain pipeline, one song at a time, in the same run. ``--tiny`` tries the script out on a CPU.
"""

import argparse
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.audio_codes import CODE_COUNT, CODES_PER_SECOND
from acestep_consumer.engine.renderer import startup
from acestep_consumer.engine.renderer.batch_request import RequestCallbacks
from acestep_consumer.engine.renderer.denoising.dcw import Dcw
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch
from acestep_consumer.engine.renderer.denoising.sample import SamplerOptions
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.testing import tiny_checkpoint
from tests.bench import full_size

_PLAIN = SamplerOptions()
MIXED = (30, 60, 90, 120, 150, 180, 210, 240, 270, 300)
LYRICS = "[verse]\n" + "singing in the morning light over the hills\n" * 12
PROMPT = "upbeat electronic dance music with heavy bass"


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments(
    seconds: int, seed: int, model: str = tiny_checkpoint.TURBO, sampler: SamplerOptions = _PLAIN
) -> PipelineArguments:
    steps, guidance = (8, 1.0) if model == tiny_checkpoint.TURBO else (50, 7.0)
    codes = tuple((seed * 7919 + 61 * index) % CODE_COUNT for index in range(CODES_PER_SECOND * seconds))
    return PipelineArguments(
        prompt=PROMPT,
        lyrics=LYRICS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        audio_codes=(codes,),
        seeds=(seed,),
        sampler=sampler,
    )


def songs_a_minute(
    scheduler: Scheduler, lengths: Sequence[int], in_flight: int, seconds: float, sampler: SamplerOptions = _PLAIN
) -> tuple[float, float]:
    """Keep so many songs in flight for so long. Returns songs a minute and the device's busy share."""
    (model,) = scheduler._runners
    numbers, done, stop = itertools.count(1), itertools.count(), threading.Event()

    def keep_rendering(mine: Iterator[int]) -> None:
        while not stop.is_set():
            made = arguments(next(mine), next(numbers), model, sampler)
            futures = scheduler.submit(model, made, None, RequestCallbacks())
            futures.audio[0].result().wait()
            next(done)

    threads = [
        threading.Thread(target=keep_rendering, args=(itertools.cycle((*lengths[at:], *lengths[:at])),), daemon=True)
        for at in (index % len(lengths) for index in range(in_flight))
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)  # past the start, when all arrive at once
    before, busy, began = next(done), scheduler.clock.busy_s, time.perf_counter()
    time.sleep(seconds)
    after, busy, took = next(done), scheduler.clock.busy_s - busy, time.perf_counter() - began
    stop.set()
    for thread in threads:
        thread.join()
    return 60 * (after - before - 1) / took, busy / took


def flops_of_step(seconds: float, condition: int = 700, width: int = 2048) -> float:
    """Multiplications and additions of one DiT step of one song, as the plain model does them."""
    n = seconds * 12.5
    layer = 2 * n * (2 * width * width + 2 * width * 1024 + 3 * width * 6144)
    layer += 2 * (2 * n * width * width + 2 * condition * width * 1024) + 4 * n * condition * width
    return 24 * layer + 12 * 4 * n * n * width + 12 * 4 * n * min(n, 257) * width


def step_ms(scheduler: Scheduler, seconds: Sequence[int], *, times: int = 10, condition: int = 700) -> float:
    """Return the milliseconds of one DiT step of one pack, over so many steps."""
    (runner,) = scheduler._runners.values()
    dit = runner.parts.dit

    def run() -> float:
        width, channels = dit.dit.config.encoder_hidden_size, dit.dit.config.audio_acoustic_hidden_dim
        make = partial(torch.randn, device=dit.device, dtype=dit.dtype)
        branches = [
            Branch(own, make(25 * each, 2 * channels), make(25 * each, channels))
            for own, each in zip(dit.conditions([make(condition, width) for _ in seconds]), seconds, strict=True)
        ]
        pack, flow = runner.denoiser(None).pack_and_flow(branches)
        latents, flow_times = pack.join([branch.latents for branch in branches]), make(len(branches) + 1)
        return timed(lambda: flow(latents, flow_times), times)

    return scheduler.run_on_device(run)


def preparing_ms(scheduler: Scheduler, seconds: int, songs: int, times: int = 5) -> tuple[float, float]:
    """Return milliseconds a song of encoding texts and codes into samples: of the host alone, and with the device."""
    ((model, runner),) = scheduler._runners.items()

    def run() -> tuple[float, float]:
        host, whole = [], []
        for turn in range(times + 2):
            asked = [runner.preparer.prepare(arguments(seconds, songs * turn + n, model)) for n in range(songs)]
            synchronized()
            began = time.perf_counter()
            runner.samples(asked, None)
            host.append(time.perf_counter() - began)
            synchronized()
            whole.append(time.perf_counter() - began)
        return 1000 * min(host[2:]) / songs, 1000 * min(whole[2:]) / songs

    return scheduler.run_on_device(run)


def synchronized() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def for_a_second(scheduler: Scheduler, seconds: Sequence[int], rounds: int = 3) -> str:
    """Compare steps and products at the clock that the card can hold, a second of each in turn."""
    steps, products = [], []
    for _ in range(rounds):
        products.append(matrix_peak(700))
        steps.append(sum(map(flops_of_step, seconds)) / step_ms(scheduler, seconds, times=40) / 1e9)
    shares = ", ".join(f"{100 * step / product:.0f}%" for step, product in zip(steps, products, strict=True))
    return f"for a second: {max(steps):.0f} of {max(products):.0f} TFLOP/s; rounds: {shares}"


def timed(work: Callable[[], object], times: int = 10) -> float:
    """Milliseconds a call."""
    for _ in range(2):
        work()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(times):
            work()
        return 1000 * (time.perf_counter() - began) / times
    start, end = _event(), _event()
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / times


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's


def matrix_peak(times: int = 10) -> float:
    """TFLOP/s of a large product in bfloat16 on this card, over so many of them.

    Ten are over before the card is warm. In a second of them it reaches its power limit and lowers its clock.
    """
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / timed(lambda: a @ a, times) / 1e9


def plainly(pipeline: Any, seconds: int, songs: int = 3) -> float:
    """Songs a minute of the plain pipeline, one at a time."""

    def one(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pipeline(
            prompt=PROMPT, lyrics=LYRICS, audio_duration=float(seconds), generator=generator, guidance_scale=1.0
        ).audios.cpu()

    one(0)
    began = time.perf_counter()
    for seed in range(songs):
        one(seed)
    return 60 * songs / (time.perf_counter() - began)


def cases(text: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for case in text.split(","):
        length, _, in_flight = case.rpartition("x")
        yield case, MIXED if length == "mixed" else (int(length),), int(in_flight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="30x1,30x16,120x16,300x1,300x8,mixedx16")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--plain", default="", help="lengths for the plain pipeline, comma-separated")
    parser.add_argument(
        "--steps", default="30;120;300;30,30,30,30,30,30,30,30;300,300", help="packs for DiT steps, by ;"
    )
    parser.add_argument("--profile", default="", metavar="CASES", help="cases whose GPU time is told by kernel")
    parser.add_argument("--base", action="store_true", help="the base model instead of turbo")
    parser.add_argument("--dcw", action="store_true", help="with DCW, which requests for turbo models have by default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--vram", type=float, help="pretend that the card has this many GB")
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        model = tiny_checkpoint.BASE if asked.base else tiny_checkpoint.TURBO
        if asked.tiny:
            tiny_checkpoint.write(Path(folder))
        else:
            full_size.write(Path(folder), model)
        tell(f"checkpoint written in {time.perf_counter() - began:.0f} s")
        if asked.plain:
            pipeline = full_size.pipeline("cuda", torch.bfloat16)
            pipeline.set_progress_bar_config(disable=True)
            for seconds in map(int, asked.plain.split(",")):
                tell(f"plain diffusers {seconds} s: {plainly(pipeline, seconds):.0f} songs/min")
            del pipeline
            torch.cuda.empty_cache()
        measure_all(asked, Path(folder), model)


def measure_all(asked: argparse.Namespace, folder: Path, model: str) -> None:
    began = time.perf_counter()

    def say(what: str, _: str = "") -> None:
        tell(f"  {time.perf_counter() - began:6.1f} s {what}")

    device = "cpu" if asked.tiny else "cuda"
    settings = EngineSettings(checkpoint_dir=folder, config_path=model, device=device, max_vram_gb=asked.vram)
    opened = startup.open_runtime(settings, say)
    scheduler = opened.scheduler
    report, limits = opened.report, scheduler.degradation
    say(f"ready: {report.attention}, compiled={report.compiled}, {limits}, {opened.footprint}")
    peak = 0.0 if asked.tiny else matrix_peak()
    tell(f"matrix peak {peak:.0f} TFLOP/s")
    for pack in asked.steps.split(";") if asked.steps else ():
        seconds = [int(each) for each in pack.split(",")]
        took = step_ms(scheduler, seconds)
        rate = sum(map(flops_of_step, seconds)) / took / 1e9
        share = f", {100 * rate / peak:.0f}% of peak" if peak else ""
        tell(f"DiT step of {pack} s: {took:.2f} ms, {rate:.0f} TFLOP/s{share}")
        if peak:
            tell(f"  {for_a_second(scheduler, seconds)}")
    for length, songs in ((30, 1), (30, 8), (300, 1), (300, 4)) if not asked.tiny else ((5, 2),):
        host, whole = preparing_ms(scheduler, length, songs)
        tell(f"preparing {songs} songs of {length} s: {host:.1f} ms a song of the host, {whole:.1f} until it is done")
    for name, lengths, in_flight in cases(asked.cases):
        sampler = SamplerOptions(dcw=Dcw()) if asked.dcw else _PLAIN
        rate, busy = songs_a_minute(scheduler, lengths, in_flight, asked.seconds, sampler)
        stats = scheduler.stats
        last = f"last batch {stats.songs_in_pack} songs, {stats.tokens_in_pack} tokens"
        tell(f"{name}: {rate:.0f} songs/min, device busy {100 * busy:.0f}%, {last}, reductions {limits.reductions}")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        gib = [each / 2**30 for each in (allocated, reserved, total - free)]
        tell("memory, GiB: {:.2f} allocated, {:.2f} reserved, {:.2f} of the card in use".format(*gib))
    for name, lengths, in_flight in cases(asked.profile) if asked.profile else ():
        tell(f"{name}, stages")
        tell_stages(scheduler, lengths, in_flight)
        tell(f"{name}, kernels")
        profile(scheduler, lengths, in_flight)


_STAGES = ("_receive", "_drop_cancelled", "_admit", "_step", "_align", "_decode", "_rest_if_idle")


def tell_stages(scheduler: Scheduler, lengths: Sequence[int], in_flight: int, seconds: float = 4) -> None:
    """Tell what the device's thread does on the host, while so many songs are in flight."""
    spent, calls = dict.fromkeys(_STAGES, 0.0), dict.fromkeys(_STAGES, 0)

    def measured(stage: str, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            began = time.perf_counter()
            work()
            spent[stage] += time.perf_counter() - began
            calls[stage] += 1

        return run

    for stage in _STAGES:
        setattr(scheduler, stage, measured(stage, getattr(scheduler, stage)))
    before, began = scheduler.stats.songs_done, time.perf_counter()
    songs_a_minute(scheduler, lengths, in_flight, seconds)
    took, songs = time.perf_counter() - began, max(scheduler.stats.songs_done - before, 1)
    tell(f"  {songs} songs in {took:.1f} s, {calls['_step'] / songs:.1f} rounds a song")
    tell("  milliseconds a song on the device's thread")
    for stage in _STAGES:
        tell(f"    {stage[1:]:16} {1000 * spent[stage] / songs:7.2f}")
        delattr(scheduler, stage)


def profile(scheduler: Scheduler, lengths: Sequence[int], in_flight: int, seconds: float = 4) -> None:
    """Tell where the GPU's time goes, by kind of kernel and by kernel, while so many songs are in flight."""
    before, busy = scheduler.stats.songs_done, scheduler.clock.busy_s
    began = time.perf_counter()
    where = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with record(activities=[where]) as recorded:
        songs_a_minute(scheduler, lengths, in_flight, seconds)
    took, songs = time.perf_counter() - began, scheduler.stats.songs_done - before
    busy = scheduler.clock.busy_s - busy
    found = [(each.key, each.device_time_total / 1e3, each.count) for each in recorded.key_averages()]
    kinds: dict[str, list[tuple[float, int]]] = {}
    for key, milliseconds, count in found:
        kinds.setdefault(_kind(key), []).append((milliseconds, count))
    tell(f"{songs} songs in {took:.1f} s, {1000 * took / max(songs, 1):.1f} ms a song, busy {100 * busy / took:.0f}%")
    for kind, rows in kinds.items():
        spent, launches = sum(each for each, _ in rows), sum(each for _, each in rows)
        tell(f"  {kind:12} {spent / max(songs, 1):8.2f} ms a song, {launches / max(songs, 1):8.1f} launches")
    for key, milliseconds, count in sorted(found, key=lambda each: -each[1])[:20]:
        tell(f"    {milliseconds / max(songs, 1):8.3f} ms a song, {count / max(songs, 1):7.1f} launches  {key[:90]}")


_KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "sm90_xmma"),
    "attention": ("flash", "fmha"),
    "decoder": ("conv", "snake", "cudnn"),
    "copies": ("memcpy", "memset"),
}


def _kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "elementwise")


if __name__ == "__main__":
    main()
