# SPDX-License-Identifier: Apache-2.0
"""The scheduler with jobs that fail, jobs that are cancelled, and memory that runs out: no other job is affected."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from acestep_consumer.audio import codec
from acestep_consumer.audio.encoding.pool import EncoderPool
from acestep_consumer.concurrency.priority import rank_of
from acestep_consumer.concurrency.slots import RankedSlots
from acestep_consumer.domain.errors import Cancelled, RenderFailed, ResourceExhausted
from acestep_consumer.domain.job import Rendering, Sources
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer.batch_request import BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.conditioning import Conditioner
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.render import render
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from acestep_consumer.policy.memory_budget import MemoryBudget, MemoryFootprint
from tests.support.scheduler_harness import (
    RATE,
    Result,
    SchedulerHarness,
    assert_same,
    open_runners,
    record_device,
    recording,
    render_message,
    wait_for,
)
from tests.support.waiting import WITHIN_S

POISONED = 13  # inference steps: only the job that is to fail has so many


@pytest.fixture(scope="module")
def runners(tiny_checkpoints: Path) -> dict[str, ModelRunner]:
    return open_runners(tiny_checkpoints)


@pytest.fixture
def harness(runners: dict[str, ModelRunner], monkeypatch: pytest.MonkeyPatch) -> SchedulerHarness:
    """A scheduler that has never run out of memory."""
    made = SchedulerHarness(runners)
    record_device(made, monkeypatch)
    return made


@pytest.fixture
def neighbours(tmp_path: Path) -> list[Render]:
    lengths = (0.5, 0.9, 0.3)
    return [
        render_message(tmp_path, audio_duration=seconds, inference_steps=3, seeds=(index,))
        for index, seconds in enumerate(lengths)
    ]


@pytest.fixture
def poisoned(tmp_path: Path) -> Render:
    return render_message(tmp_path, audio_duration=6, inference_steps=POISONED, seeds=(66,))


def seed_of(sample: Sample) -> int:
    return sample.generator.initial_seed()


def is_poisoned(sample: Sample) -> bool:
    return sample.steps == POISONED


def assert_only_the_middle_one_fails(
    harness: SchedulerHarness, neighbours: Sequence[Render], poisoned: Render, error: type[Exception], said: str
) -> None:
    """Run all at once, then the neighbours again without it: they are the same as ever."""
    before, after = neighbours[:1], neighbours[1:]
    with harness.held():
        first = [harness.submit(message) for message in before]
        middle = harness.submit(poisoned)
        last = [harness.submit(message) for message in after]
    found = [harness.result(futures) for futures in (*first, *last)]
    with pytest.raises(error, match=said):
        harness.result(middle)
    for one, other in zip(found, harness.together(neighbours), strict=True):
        assert_same(one, other)


def test_a_song_whose_step_fails_does_not_fail_others(
    harness: SchedulerHarness, neighbours: list[Render], poisoned: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Sample.advance

    def failing(self: Sample, velocities: Any) -> None:
        if is_poisoned(self) and self.step == 1:
            raise ValueError("this sample failed")
        advance(self, velocities)

    monkeypatch.setattr(Sample, "advance", failing)
    assert_only_the_middle_one_fails(harness, neighbours, poisoned, ValueError, "this sample failed")
    assert harness.largest == 4


def test_a_song_that_fails_the_whole_batchs_step_does_not_fail_others(
    harness: SchedulerHarness, neighbours: list[Render], poisoned: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ModelRunner.step

    def failing(self: ModelRunner, samples: Sequence[Sample], lora: Any) -> Any:
        found = step(self, samples, lora)
        if any(is_poisoned(sample) and sample.step == 1 for sample in samples):
            raise RuntimeError("the batch failed")
        return found

    monkeypatch.setattr(ModelRunner, "step", failing)
    assert_only_the_middle_one_fails(harness, neighbours, poisoned, RuntimeError, "the batch failed")
    assert harness.largest == 4


def test_a_song_that_fails_the_decode_does_not_fail_others(
    harness: SchedulerHarness, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ready at the same step as its neighbours, so that all are decoded together."""
    poisoned = render_message(tmp_path, audio_duration=6, inference_steps=3, seeds=(66,), shift=1.0)
    decode, batch_sizes = ModelRunner.decode, list[int]()

    def failing(self: ModelRunner, samples: Sequence[Sample], tiles: int) -> Any:
        batch_sizes.append(len(samples))
        if any(sample.frames == 150 for sample in samples):
            raise RuntimeError("the decode failed")
        return decode(self, samples, tiles)

    monkeypatch.setattr(ModelRunner, "decode", failing)
    assert_only_the_middle_one_fails(harness, neighbours, poisoned, RuntimeError, "the decode failed")
    assert batch_sizes[0] == 4


def test_a_song_that_is_not_finite_leaves_the_others_finite(
    harness: SchedulerHarness, neighbours: list[Render], poisoned: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in the batch, as infinities of half precision would."""
    branches = Sample.branches

    def spoiled(self: Sample) -> Any:
        if is_poisoned(self):
            self.latents = torch.full_like(self.latents, torch.nan)
        return branches(self)

    monkeypatch.setattr(Sample, "branches", spoiled)
    with harness.held():
        middle = harness.submit(poisoned)
        all_futures = [harness.submit(message) for message in neighbours]
    found = [harness.result(futures) for futures in all_futures]
    assert harness.result(middle).latents[0].isnan().all()
    assert harness.largest == 4
    for one, other in zip(found, harness.together(neighbours), strict=True):
        assert_same(one, other)
    with pytest.raises(RenderFailed, match="not finite"):
        rendered(harness.scheduler, poisoned)


def test_a_source_that_is_too_short_to_encode_fails_its_job_only(
    harness: SchedulerHarness, neighbours: list[Render], tmp_path: Path
) -> None:
    """All covers are prepared together, with one whose source is a thousandth of a second."""
    usual = Sources(source=recording(tmp_path / "usual", seconds=0.8, hz=220))
    bad = Sources(source=recording(tmp_path / "bad", seconds=0.001, hz=220))
    cover: dict[str, Any] = {"task_type": "cover", "inference_steps": 3}
    covers = [render_message(tmp_path, seeds=(5,), sources=usual, **cover), *neighbours]
    poisoned = render_message(tmp_path, seeds=(6,), sources=bad, **cover)
    assert_only_the_middle_one_fails(harness, covers, poisoned, RuntimeError, "ernel")
    assert harness.largest == 4


def test_audio_codes_that_a_checkpoint_cannot_read_are_refused_at_submission(
    harness: SchedulerHarness, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without an audio tokenizer still renders from text."""
    before = harness.together(neighbours)
    monkeypatch.setattr(harness.runners[TURBO].parts.pipeline, "audio_tokenizer", None)
    with harness.held():
        first = harness.submit(neighbours[0])
        with pytest.raises(ValueError, match="no audio tokenizer"):
            harness.submit(render_message(tmp_path, audio_code_string="<|audio_code_5|>" * 5))
        others = [harness.submit(message) for message in neighbours[1:]]
    for futures, other in zip((first, *others), before, strict=True):
        assert_same(harness.result(futures), other)


def test_a_job_of_two_songs_that_fails_at_the_last_step_costs_no_second_decode(
    harness: SchedulerHarness, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first song is finished when its second one fails: the job has failed, and nothing of it is decoded."""
    poisoned = render_message(tmp_path, audio_duration=6, inference_steps=3, seeds=(66, 67))
    advance, decode, decoded = Sample.advance, ModelRunner.decode, list[list[int]]()

    def failing(self: Sample, velocities: Any) -> None:
        if self.frames == 150 and self.step == 2 and seed_of(self) == 67:
            raise ValueError("so close")
        advance(self, velocities)

    def recording_decode(self: ModelRunner, samples: Sequence[Sample], tiles: int) -> Any:
        decoded.append([sample.heard_frames or sample.frames for sample in samples])
        return decode(self, samples, tiles)

    monkeypatch.setattr(Sample, "advance", failing)
    monkeypatch.setattr(ModelRunner, "decode", recording_decode)
    assert_only_the_middle_one_fails(harness, neighbours, poisoned, ValueError, "so close")
    assert decoded == [[12, 22, 7], [12, 22, 7]]


def test_a_cancelled_job_leaves_the_batch_within_a_step(
    harness: SchedulerHarness, neighbours: list[Render], poisoned: Render
) -> None:
    """It is cancelled during its second step, and no third one is taken."""
    enough = threading.Event()
    callbacks = RequestCallbacks(enough.is_set, lambda done: enough.set() if done * POISONED > 1.5 else None)
    with harness.held():
        middle = harness.submit(poisoned, callbacks)
        all_futures = [harness.submit(message) for message in neighbours]
    found = [harness.result(futures) for futures in all_futures]
    with pytest.raises(Cancelled):
        harness.result(middle)
    assert [sum(map(is_poisoned, batch.samples)) for batch in harness.batches] == [1, 1, 0]
    assert [len(batch.samples) for batch in harness.batches] == [4, 4, 3]
    for one, other in zip(found, harness.together(neighbours), strict=True):
        assert_same(one, other)


def test_a_job_that_is_cancelled_while_it_waits_never_starts(
    harness: SchedulerHarness, neighbours: list[Render]
) -> None:
    with harness.held():
        cancelled = harness.submit(neighbours[0], RequestCallbacks(cancelled=lambda: True))
        futures = harness.submit(neighbours[1])
    with pytest.raises(Cancelled):
        harness.result(cancelled)
    harness.result(futures)
    assert {len(batch.samples) for batch in harness.batches} == {1}


def test_a_lone_job_starts_at_once_and_others_join_it(harness: SchedulerHarness, neighbours: list[Render]) -> None:
    """The second job is only sent once the first one has taken a step."""
    begun, follow = threading.Event(), threading.Event()

    def progressed(_done: float) -> None:
        begun.set()
        assert follow.wait(WITHIN_S)

    first = harness.submit(neighbours[0], RequestCallbacks(progressed=progressed))
    assert begun.wait(WITHIN_S)
    assert [len(batch.samples) for batch in harness.batches] == [1]
    second = harness.submit(neighbours[1])
    follow.set()
    harness.result(first), harness.result(second)
    assert [batch.steps for batch in harness.batches] == [(0,), (1, 0), (2, 1), (2,)]


def test_a_job_of_a_higher_rank_passes_those_that_have_not_begun_and_none_that_has(
    harness: SchedulerHarness, tmp_path: Path
) -> None:
    """One song at a time fits into a batch. The first is under way when those of priority 9 arrive."""
    begun, arrived = threading.Event(), threading.Event()
    messages = [
        render_message(tmp_path, audio_duration=0.4, inference_steps=3, seeds=(seed,), rank=rank_of(priority, 1000.0))
        for seed, priority in enumerate((0, 0, 9, 5, 9))
    ]

    def wait_once(done: float) -> None:
        begun.set()
        assert arrived.wait(WITHIN_S)

    harness.scheduler.degradation.tokens = 1
    first = harness.submit(messages[0], RequestCallbacks(progressed=wait_once))
    assert begun.wait(WITHIN_S)
    others = [harness.submit(message) for message in messages[1:]]
    arrived.set()
    for futures in (first, *others):
        harness.result(futures)
    order = [seed_of(sample) for batch in harness.batches for sample in batch.samples]
    assert order == [seed for seed in (0, 2, 4, 3, 1) for _ in range(3)]


def test_jobs_that_wait_for_memory_are_admitted_by_rank(
    runners: dict[str, ModelRunner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory for one job: those of priority 9 are next, in the order of arrival, and a low one is not forgotten."""
    harness = SchedulerHarness(runners, MemoryBudget(limit=1, footprint=MemoryFootprint(frame=1)))
    record_device(harness, monkeypatch)
    arrivals = ((0, 0.0), (0, 1.0), (9, 2.0), (9, 3.0), (9, 400.0))
    harness.together(
        [
            render_message(tmp_path, audio_duration=0.4, inference_steps=2, seeds=(seed,), rank=rank_of(*arrival))
            for seed, arrival in enumerate(arrivals)
        ]
    )
    order = [seed_of(sample) for batch in harness.batches for sample in batch.samples]
    assert order[::2] == [2, 3, 0, 1, 4]


def test_songs_that_wait_for_an_encoder_get_it_by_rank(harness: SchedulerHarness, tmp_path: Path) -> None:
    """One encoder, and another song has it while these are decoded."""
    pool, served = EncoderPool(1), list[int]()
    resources = RenderResources(harness.scheduler, encoders=pool)

    def make(seed: int, priority: int) -> None:
        def report(fraction: float, stage: str) -> None:
            if stage == "encode" and not fraction:
                served.append(seed)

        rank = rank_of(priority, 1000.0 + seed)
        message = render_message(tmp_path / str(seed), audio_duration=0.4, seeds=(seed,), rank=rank)
        message.folder.mkdir(parents=True)
        render(resources, message, report, lambda: False)

    try:
        with ThreadPoolExecutor(4) as threads:
            with pool.slot(lambda: False):
                done = [threads.submit(make, seed, priority) for seed, priority in enumerate((0, 0, 5, 9))]
                wait_for(lambda: len(pool._slots._queue) == 4)
            for each in done:
                each.result(WITHIN_S)
    finally:
        pool.close()
    assert served == [3, 2, 0, 1]


def test_inputs_that_wait_for_a_decoder_are_decoded_by_rank(
    harness: SchedulerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One decoder, which another input has. A job that is cancelled while it waits ends."""
    decoders, cancelled, decoded = RankedSlots(1), threading.Event(), list[str]()
    resources = RenderResources(harness.scheduler, decoders=decoders)
    monkeypatch.setattr(codec, "decode", lambda path, **_: decoded.append(path.name))

    def queued(count: int) -> bool:
        return len(decoders._queue) == count

    def decode(name: str, priority: int) -> None:
        def stopped() -> bool:
            return name == "given up" and cancelled.is_set()

        with suppress(Cancelled):
            resources.decode(tmp_path / name, RATE, "the source audio", stopped, rank_of(priority, 1000.0))

    with ThreadPoolExecutor(4) as threads, decoders.held(0, lambda: None):
        arrivals = (("first", 0), ("given up", 5), ("second", 0), ("urgent", 9))
        for place, (name, priority) in enumerate(arrivals):
            threads.submit(decode, name, priority)
            wait_for(partial(queued, place + 1))
        cancelled.set()
        wait_for(partial(queued, 3))
    assert decoded == ["urgent", "first", "second"]


def test_two_models_take_turns_step_by_step(harness: SchedulerHarness, tmp_path: Path) -> None:
    """Three turbo songs do not make the base model's one wait longer than one step."""
    messages = [
        render_message(tmp_path, model=model, audio_duration=0.5, inference_steps=4, seeds=(index,))
        for index, model in enumerate((TURBO, TURBO, TURBO, BASE))
    ]
    packed = harness.together(messages)
    models = [batch.model for batch in harness.batches]
    assert len(models) == 8
    assert all(one != other for one, other in pairwise(models))
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))


def test_jobs_wait_while_others_hold_the_memory_and_go_on_in_their_order(
    runners: dict[str, ModelRunner], neighbours: list[Render], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A latent frame is a byte here, and half of all bytes are a step's: 547 frames fit at once."""
    harness = SchedulerHarness(runners, MemoryBudget(limit=1094, footprint=MemoryFootprint(token=1, frame=1, tile=1)))
    record_device(harness, monkeypatch)
    assert harness.budget.free == 1094
    assert harness.budget.working == 547
    lengths = (300, 240, 130, 150)
    messages = [
        render_message(tmp_path, audio_duration=frames / 25 - 0.01, inference_steps=steps, seeds=(frames,))
        for frames, steps in zip(lengths, (3, 2, 2, 1), strict=True)
    ]
    packed = harness.together(messages)
    present = [sorted(sample.frames for sample in batch.samples) for batch in harness.batches]
    assert all(sum(frames) <= 547 for frames in present)
    assert present[0] == [240, 300]
    assert sorted(frame for frames in present for frame in frames) == sorted([300] * 3 + [240] * 2 + [130] * 2 + [150])
    assert harness.scheduler.reductions > 0
    for one, message in zip(packed, messages, strict=True):
        assert_same(one, harness.alone(message))


# Memory that runs out


def without_memory(
    monkeypatch: pytest.MonkeyPatch, method: str, too_much: Callable[[Any], bool], owner: type = ModelRunner
) -> list[int]:
    """Let a method run out of memory when its first argument is too much. Returns that argument's length by call."""
    original, asked = getattr(owner, method), []

    def out_of_memory(self: Any, first: Any, *others: Any) -> Any:
        asked.append(len(first) if isinstance(first, Sequence) else 0)
        if too_much(first):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, first, *others)

    monkeypatch.setattr(owner, method, out_of_memory)
    return asked


def rendered(scheduler: Scheduler, message: Render) -> Rendering:
    message.folder.mkdir(exist_ok=True)
    return render(RenderResources(scheduler), message, lambda *_: None, lambda: False)


def arrived(harness: SchedulerHarness, jobs: int) -> bool:
    return harness.scheduler.pending >= jobs


def rendered_together(harness: SchedulerHarness, messages: Sequence[Render]) -> list["Future[Rendering]"]:
    """Render jobs in threads of their own; the device's thread finds them all at once."""
    with ThreadPoolExecutor(len(messages)) as threads:
        with harness.held():
            found = []
            for number, message in enumerate(messages, start=1):
                found.append(threads.submit(rendered, harness.scheduler, message))
                wait_for(partial(arrived, harness, number))
        return found


def test_a_batch_that_does_not_fit_becomes_smaller_and_stays_so(
    harness: SchedulerHarness, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = without_memory(monkeypatch, "step", lambda samples: len(samples) > 2)
    messages = [render_message(tmp_path / str(n), audio_duration=1, inference_steps=2, seeds=(n,)) for n in range(4)]
    made = [future.result() for future in rendered_together(harness, messages)]
    assert sizes[:2] == [4, 2]
    assert sizes.count(4) == 1
    assert max(sizes[1:]) == 2
    for rendering in made:
        assert rendering.warnings == ("out of memory with 4 songs in a batch: batches are now limited to 128 tokens",)
    assert harness.scheduler.degradation.reductions == 1
    sizes.clear()
    again = harness.together(messages)
    assert max(sizes) == 2
    assert [one.warnings for one in again] == [[]] * 4
    monkeypatch.undo()
    for one, message in zip(again, messages, strict=True):
        (audio,) = one.audio
        (track,) = rendered(harness.scheduler, message).tracks
        torch.testing.assert_close(torch.from_numpy(codec.decode(track.path, sample_rate=RATE, max_seconds=9)), audio)


def test_one_job_of_many_songs_that_do_not_fit_together_is_stepped_song_by_song(
    harness: SchedulerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = render_message(tmp_path, seeds=(1, 2, 3, 4))
    before = harness.alone(message)
    sizes = without_memory(monkeypatch, "step", lambda samples: len(samples) > 1)
    after = harness.alone(message)
    assert sizes[:3] == [4, 2, 1]
    assert set(sizes[3:]) == {1}
    assert len(after.warnings) == 2
    assert_same(after, before)


def test_a_decode_that_does_not_fit_takes_fewer_tiles_from_then_on(
    harness: SchedulerHarness, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, decode, tiles_asked = harness.together(neighbours), ModelRunner.decode, list[int]()

    def out_of_memory(self: ModelRunner, samples: Sequence[Sample], tiles: int) -> Any:
        tiles_asked.append(tiles)
        if tiles > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, samples, tiles)

    monkeypatch.setattr(ModelRunner, "decode", out_of_memory)
    after = harness.together(neighbours)
    assert tiles_asked == [8, 4, 1]
    assert after[0].warnings == [
        "out of memory in the VAE decode: now 4 tiles at a time instead of 8",
        "out of memory in the VAE decode: now 1 tiles at a time instead of 4",
    ]
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)
    assert harness.alone(neighbours[0]).warnings == []
    assert tiles_asked == [8, 4, 1, 1]


def test_preparing_too_many_jobs_together_prepares_fewer_from_then_on(
    harness: SchedulerHarness, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = harness.together(neighbours)
    asked = without_memory(monkeypatch, "samples", lambda requests: len(requests) > 1)
    after = harness.together(neighbours)
    assert asked == [3, 1, 1, 1]
    assert harness.scheduler.degradation.jobs == 1
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)
    asked.clear()
    harness.together(neighbours)
    assert asked == [1, 1, 1]


def test_a_cover_that_is_prepared_twice_is_the_same_song(
    harness: SchedulerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out for the second of two covers: the first one, ready by then, is prepared again."""
    sources = Sources(source=recording(tmp_path / "source", seconds=0.8, hz=220))
    messages = [render_message(tmp_path, task_type="cover", seeds=(seed,), sources=sources) for seed in (1, 2)]
    before = harness.together(messages)
    calls = iter(range(9))
    without_memory(monkeypatch, "_source_and_timbres", lambda request: next(calls) == 1, owner=Conditioner)
    after = harness.together(messages)
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)


def test_models_are_offloaded_before_a_job_gets_the_device_to_itself(
    harness: SchedulerHarness, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloading needs a GPU; here only its text is returned."""
    warnings = ["models wait in RAM"]
    fails = iter((True, False))
    monkeypatch.setattr(Scheduler, "_offload", lambda self: warnings.pop() if warnings else None)
    before = harness.alone(neighbours[0])
    warnings.append("models wait in RAM")
    without_memory(monkeypatch, "step", lambda samples: next(fails, False))
    after = harness.alone(neighbours[0])
    assert after.warnings == ["models wait in RAM"]
    assert_same(after, before)


def test_all_reductions_down_to_the_job_that_fails(
    harness: SchedulerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job never fits. Its batch is reduced, models are offloaded, it runs alone, and only then it fails."""
    offloads = ["models wait in RAM"]
    monkeypatch.setattr(Scheduler, "_offload", lambda self: offloads.pop() if offloads else None)
    messages = [render_message(tmp_path / str(n), audio_duration=1, inference_steps=3, seeds=(n,)) for n in range(3)]
    giant = render_message(tmp_path / "giant", audio_duration=8, inference_steps=3, seeds=(9,))
    before = harness.together(messages)
    batches: list[list[int]] = []
    step = ModelRunner.step

    def out_of_memory(self: ModelRunner, samples: Sequence[Sample], lora: Any) -> Any:
        batches.append([sample.frames for sample in samples])
        if any(sample.frames == 200 for sample in samples):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, samples, lora)

    monkeypatch.setattr(ModelRunner, "step", out_of_memory)
    futures = rendered_together(harness, [messages[0], giant, *messages[1:]])
    with pytest.raises(ResourceExhausted, match="too little memory"):
        futures[1].result()
    assert batches[0] == [128, 200, 128, 128]
    assert batches.count([200]) == 3  # before the offload, after it, and alone
    survivors = [futures[index].result() for index in (0, 2, 3)]
    for rendering, other in zip(survivors, before, strict=True):
        (track,) = rendering.tracks
        audio = torch.from_numpy(codec.decode(track.path, sample_rate=RATE, max_seconds=9))
        torch.testing.assert_close(audio, other.audio[0], rtol=0, atol=1e-5)
        assert rendering.warnings[0].startswith("out of memory with 4 songs in a batch")
    assert not offloads


def test_a_job_that_is_restarted_alone_gives_the_same_song_and_a_warning(
    harness: SchedulerHarness, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job fits only when no other is on the device: it is restarted, with the same SDE noise."""
    large = render_message(neighbours[0].folder, audio_duration=8, inference_steps=3, infer_method="sde", seeds=(9,))
    before = harness.alone(large)
    harness.scheduler.degradation.tokens = 1  # one sample at a time
    present: set[BatchRequest] = set()
    step = ModelRunner.step

    def out_of_memory(self: ModelRunner, samples: Sequence[Sample], lora: Any) -> Any:
        present.clear()
        present.update(request for request in harness.scheduler._active if not request.completed)
        if any(sample.frames == 200 and sample.step == 1 for sample in samples) and len(present) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, samples, lora)

    monkeypatch.setattr(ModelRunner, "step", out_of_memory)
    found, *others = harness.together([large, *neighbours])
    assert found.warnings[-1] == "out of memory: the job was restarted alone on the device"
    assert_same(found, before)
    assert all("restarted" not in warning for one in others for warning in one.warnings)
    for one, other in zip(others, harness.together(neighbours), strict=True):
        assert_same(one, other)


def test_running_out_of_memory_in_a_samples_own_step_does_not_fail_the_job(
    harness: SchedulerHarness, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the forward pass there are guidance and the noise scheduler's step, and both allocate."""
    before, advance = harness.together(neighbours), Sample.advance
    fails = iter((False, False, True))

    def short(self: Sample, velocities: Any) -> None:
        if next(fails, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(self, velocities)

    monkeypatch.setattr(Sample, "advance", short)
    after: list[Result] = harness.together(neighbours)
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)
