# SPDX-License-Identifier: Apache-2.0
"""The renderer on a real GPU: compiled batches, CUDA graphs, offloading, running out of memory.

Run by hand: ``pytest -m gpu tests/gpu``.
"""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AceStepPipeline

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.audio_codes import format_codes
from acestep_consumer.engine.renderer.batch_request import RequestCallbacks
from acestep_consumer.engine.renderer.denoising.denoiser import Denoiser
from acestep_consumer.engine.renderer.denoising.packed_dit import Branch
from acestep_consumer.engine.renderer.denoising.sample import SamplerOptions
from acestep_consumer.engine.renderer.lyrics import medians
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.startup import open_runtime
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO, write

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm card")]

CASES: dict[str, dict[str, Any]] = {
    "text2music": {"audio_duration": 10.0},
    "codes": {"audio_codes": ((61,) * 50,)},
    "cover": {"task_type": "cover", "audio_cover_strength": 0.5},
    "repaint": {"task_type": "repaint", "repainting_start": 1.0},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


def scheduler_with(checkpoints: Path, **settings: Any) -> Scheduler:
    chosen = EngineSettings(checkpoint_dir=checkpoints, config_path2=BASE, device="cuda", pack_wait_ms=50, **settings)
    return open_runtime(chosen).scheduler


def arguments(case: str, method: Literal["ode", "sde"] = "ode", *, model: str = TURBO) -> PipelineArguments:
    fields = {**CASES[case], "guidance_scale": 1.0 if model == TURBO else 7.0}
    if "task_type" in fields:
        noise = torch.randn(2, 3 * 48_000, generator=torch.Generator().manual_seed(1)) / 10
        fields |= {"src_audio": noise, "reference_audio": noise}
    sampler = SamplerOptions(method=method)
    return PipelineArguments(prompt="jazz", lyrics="la", seeds=(5,), sampler=sampler, tiled=False, **fields)


def songs_of(scheduler: Scheduler, *, together: bool = False) -> list[torch.Tensor]:
    """One song of each kind, all in flight at once or one after the other."""
    methods: tuple[Literal["ode", "sde"], ...] = ("ode", "sde")
    kinds = [(model, case, method) for model in (TURBO, BASE) for case in CASES for method in methods]
    asked = (
        scheduler.submit(model, arguments(case, method, model=model), None, RequestCallbacks())
        for model, case, method in kinds
    )
    begun = list(asked) if together else asked
    return [futures.audio[0].result(timeout=300).wait() for futures in begun]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return one.shape == other.shape and bool((one - other).norm() / other.norm() < tolerance)


def test_songs_in_batches_on_a_gpu_are_those_made_alone(checkpoints: Path) -> None:
    """In bfloat16 a batch rounds differently from a song alone: kernels are chosen by size."""
    scheduler = scheduler_with(checkpoints)
    alone, together = songs_of(scheduler), songs_of(scheduler, together=True)
    assert [close(one, other, 0.1) for one, other in zip(together, alone, strict=True)] == [True] * len(alone)


def test_compiled_and_graphed_songs_are_those_of_plain_kernels(checkpoints: Path) -> None:
    fast, plain = scheduler_with(checkpoints), scheduler_with(checkpoints, compile=False)
    pairs = zip(songs_of(fast), songs_of(plain), strict=True)
    assert all(close(one, other, 0.1) for one, other in pairs)


def velocities(denoiser: Denoiser, branches: list[Branch], times: torch.Tensor) -> torch.Tensor:
    pack, flow = denoiser.pack_and_flow(branches)
    latents = pack.join([branch.latents for branch in branches])
    return flow(latents, times)[: len(latents)].clone()


@pytest.mark.parametrize("model", [TURBO, BASE])
def test_a_graph_gives_the_velocities_of_launched_kernels_whatever_was_replayed_before(
    model: str, checkpoints: Path
) -> None:
    """In bfloat16; the sizes of packs come again, with other songs in them."""
    scheduler = scheduler_with(checkpoints)
    runner = scheduler._runners[model]

    def compared() -> list[bool]:
        dit, graphed = runner.parts.dit, runner.denoiser(None)
        launched, found = Denoiser(dit), []
        width, channels = dit.dit.config.encoder_hidden_size, dit.dit.config.audio_acoustic_hidden_dim
        for frames in ([750], [750] * 5, [33, 26, 1], [7500, 7500], [750, 740], [25] * 30, [751] * 5):
            noise = [torch.randn(count, 3 * channels, device=dit.device, dtype=dit.dtype) for count in frames]
            states = [torch.randn(9 + n, width, device=dit.device, dtype=dit.dtype) for n, _ in enumerate(frames)]
            branches = [
                Branch(condition, own[:, channels:], own[:, :channels])
                for condition, own in zip(dit.conditions(states), noise, strict=True)
            ]
            times = torch.rand(len(frames) + 1, device=dit.device, dtype=dit.dtype)
            for _ in range(2):
                one, other = (velocities(denoiser, branches, times) for denoiser in (graphed, launched))
                found.append(close(one, other, 0.02))
        return found

    assert all(scheduler.run_on_device(compared))
    graphs = runner.denoiser(None)._graphs
    assert graphs is not None
    assert graphs._memory is not None
    assert len(graphs._memory.graphs) >= 4


def test_no_median_kernel_is_compiled_after_the_start(checkpoints: Path) -> None:
    """A song with ``timestamps`` would have everybody wait for it, on the device's thread."""
    scheduler_with(checkpoints)
    device = torch.device("cuda", 0)
    before = medians.kernels_for.cache_info()
    kernels = medians.kernels_for(device)
    assert kernels is not None
    assert medians.kernels_for.cache_info().misses == before.misses
    compiled = kernels.subtract_twice_the_median.device_caches[device.index][0]
    known = set(compiled)
    for shape in ((1, 20, 40), (2, 700, 7_500), (1, 2_048, 3_000)):
        for dim in (medians.ROWS, medians.COLUMNS):
            medians.subtract_medians(torch.rand(shape, device=device), dim)
    assert set(compiled) == known


@pytest.mark.parametrize("keep_dit", [False, True])
def test_offloading_changes_no_song_and_leaves_the_gpu_empty(*, keep_dit: bool, checkpoints: Path) -> None:
    scheduler = scheduler_with(checkpoints, offload=True, offload_dit=not keep_dit)
    expected = songs_of(scheduler_with(checkpoints, offload=False))
    assert all(close(one, other, 0.1) for one, other in zip(songs_of(scheduler), expected, strict=True))
    for _ in range(2):  # before the second call the device's thread has found that it is idle
        scheduler.run_on_device(lambda: None)
    for runner in scheduler._runners.values():
        parts = {
            name: part for name, part in runner.parts.pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        places = {name: next(part.parameters()).device.type for name, part in parts.items()}
        assert places.pop("transformer") == ("cuda" if keep_dit else "cpu")
        assert set(places.values()) == {"cpu"}


def test_out_of_memory_on_the_gpu_offloads_models_and_the_song_is_the_same(checkpoints: Path) -> None:
    scheduler = scheduler_with(checkpoints)
    (expected, *_) = songs_of(scheduler)
    runner = scheduler._runners[TURBO]
    step, failures = runner.step, iter([torch.OutOfMemoryError("CUDA out of memory")])

    def short_of_memory_once(*given: Any) -> Any:
        for error in failures:
            raise error
        return step(*given)

    runner.step = short_of_memory_once  # type: ignore[assignment,method-assign]  # an injected fault
    futures = scheduler.submit(TURBO, arguments("text2music"), None, RequestCallbacks())
    assert close(futures.audio[0].result(timeout=300).wait(), expected, 0.1)
    assert futures.warnings == ["out of memory: models are now offloaded to RAM between uses"]


@pytest.mark.parametrize("case", ["text2music", "codes"])
@pytest.mark.parametrize("model", [TURBO, BASE])
def test_a_song_in_bfloat16_is_as_near_to_float32_as_plain_diffusers(model: str, case: str, checkpoints: Path) -> None:
    half, exact = (plainly(checkpoints / model, case, dtype) for dtype in (torch.bfloat16, torch.float32))
    (audio,) = scheduler_with(checkpoints).submit(model, arguments(case, model=model), None, RequestCallbacks()).audio
    ours = audio.result(timeout=300).wait()
    assert ours.shape == exact.shape
    assert (ours - exact).norm() < 1.25 * (half - exact).norm()


def plainly(folder: Path, case: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the song that diffusers makes of the same arguments."""
    with quietly():
        pipeline = AceStepPipeline.from_pretrained(folder, dtype=dtype).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    fields = dict(CASES[case])
    if codes := fields.pop("audio_codes", ()):
        fields |= {"audio_codes": [format_codes(each) for each in codes], "audio_duration": None}
    generator = torch.Generator().manual_seed(5)
    audios = pipeline(prompt=["jazz"], lyrics=["la"], vocal_language="en", generator=generator, **fields).audios
    return torch.as_tensor(audios[0]).float().cpu()
