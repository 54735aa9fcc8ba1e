# SPDX-License-Identifier: Apache-2.0
"""The batcher with jobs that break, jobs that are given up, and memory that runs out: nobody else notices."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from acestep_consumer.audio.codec import decode
from acestep_consumer.domain.errors import Cancelled, RenderFailed, ResourceExhausted
from acestep_consumer.domain.job import Rendering, Sources
from acestep_consumer.engine.messages import Render
from acestep_consumer.engine.renderer.batch_request import BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.conditioning import Conditioner
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.render import RenderResources, render
from acestep_consumer.engine.renderer.sample import Sample
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.testing.tiny_checkpoint import BASE, TURBO
from acestep_consumer.policy.memory_budget import MemoryBudget, MemoryFootprint
from tests.support.stage import (
    RATE,
    WITHIN_S,
    Result,
    Stage,
    assert_same,
    open_booths,
    order_for,
    recording,
    wait_for,
    watch_the_device,
)

POISONED = 13  # inference steps: only the job that is to break has so many


@pytest.fixture(scope="module")
def booths(tiny_checkpoints: Path) -> dict[str, ModelRunner]:
    return open_booths(tiny_checkpoints)


@pytest.fixture
def stage(booths: dict[str, ModelRunner], monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A batcher that has never run out of memory."""
    made = Stage(booths)
    watch_the_device(made, monkeypatch)
    return made


@pytest.fixture
def neighbours(tmp_path: Path) -> list[Render]:
    lengths = (0.5, 0.9, 0.3)
    return [
        order_for(tmp_path, audio_duration=seconds, inference_steps=3, seeds=(index,))
        for index, seconds in enumerate(lengths)
    ]


@pytest.fixture
def poisoned(tmp_path: Path) -> Render:
    return order_for(tmp_path, audio_duration=0.7, inference_steps=POISONED, seeds=(66,))


def seed_of(song: Sample) -> int:
    assert song.scheduler.generators
    return song.scheduler.generators[0].initial_seed()


def is_poisoned(song: Sample) -> bool:
    return song.steps == POISONED


def assert_only_the_middle_one_fails(
    stage: Stage, neighbours: Sequence[Render], poisoned: Render, error: type[Exception], said: str
) -> None:
    """Run all at once, then the neighbours again without it: they are the same as ever."""
    before, after = neighbours[:1], neighbours[1:]
    with stage.held():
        first = [stage.submit(order) for order in before]
        middle = stage.submit(poisoned)
        last = [stage.submit(order) for order in after]
    found = [stage.result(performance) for performance in (*first, *last)]
    with pytest.raises(error, match=said):
        stage.result(middle)
    for one, other in zip(found, stage.together(neighbours), strict=True):
        assert_same(one, other)


def test_a_song_whose_step_breaks_fails_alone(
    stage: Stage, neighbours: list[Render], poisoned: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Sample.advance

    def breaking(self: Sample, velocities: Any) -> None:
        if is_poisoned(self) and self.step == 1:
            raise ValueError("this song cannot go on")
        advance(self, velocities)

    monkeypatch.setattr(Sample, "advance", breaking)
    assert_only_the_middle_one_fails(stage, neighbours, poisoned, ValueError, "cannot go on")
    assert stage.largest == 4


def test_a_song_that_breaks_the_whole_packs_step_fails_alone(
    stage: Stage, neighbours: list[Render], poisoned: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ModelRunner.step

    def breaking(self: ModelRunner, songs: Sequence[Sample], lora: Any) -> Any:
        found = step(self, songs, lora)
        if any(is_poisoned(song) and song.step == 1 for song in songs):
            raise RuntimeError("the pack broke")
        return found

    monkeypatch.setattr(ModelRunner, "step", breaking)
    assert_only_the_middle_one_fails(stage, neighbours, poisoned, RuntimeError, "the pack broke")
    assert stage.largest == 4


def test_a_song_that_breaks_the_decode_fails_alone(
    stage: Stage, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ready at the same step as its neighbours, so that all are decoded together."""
    poisoned, sound = (
        order_for(tmp_path, audio_duration=0.7, inference_steps=3, seeds=(66,), shift=1.0),
        ModelRunner.sound,
    )
    heard: list[int] = []

    def breaking(self: ModelRunner, songs: Sequence[Sample], tiles: int) -> Any:
        heard.append(len(songs))
        if any(song.frames == 18 for song in songs):
            raise RuntimeError("the decode broke")
        return sound(self, songs, tiles)

    monkeypatch.setattr(ModelRunner, "sound", breaking)
    assert_only_the_middle_one_fails(stage, neighbours, poisoned, RuntimeError, "the decode broke")
    assert heard[0] == 4


def test_a_song_that_is_no_number_leaves_its_neighbours_numbers(
    stage: Stage, neighbours: list[Render], poisoned: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in the pack, as infinities of half precision would."""
    voices = Sample.voices

    def spoiled(self: Sample) -> Any:
        if is_poisoned(self):
            self.latents = torch.full_like(self.latents, torch.nan)
        return voices(self)

    monkeypatch.setattr(Sample, "voices", spoiled)
    with stage.held():
        middle = stage.submit(poisoned)
        performances = [stage.submit(order) for order in neighbours]
    found = [stage.result(performance) for performance in performances]
    assert stage.result(middle).latents[0].isnan().all()
    assert stage.largest == 4
    for one, other in zip(found, stage.together(neighbours), strict=True):
        assert_same(one, other)
    with pytest.raises(RenderFailed, match="not finite"):
        rendered(stage.batcher, poisoned)


def test_a_source_that_is_too_short_to_encode_fails_alone(
    stage: Stage, neighbours: list[Render], tmp_path: Path
) -> None:
    """All covers are prepared together, with one whose source is a thousandth of a second."""
    usual = Sources(source=recording(tmp_path / "usual", seconds=0.8, hz=220))
    bad = Sources(source=recording(tmp_path / "bad", seconds=0.001, hz=220))
    cover: dict[str, Any] = {"task_type": "cover", "inference_steps": 3}
    covers = [order_for(tmp_path, seeds=(5,), sources=usual, **cover), *neighbours]
    poisoned = order_for(tmp_path, seeds=(6,), sources=bad, **cover)
    assert_only_the_middle_one_fails(stage, covers, poisoned, RuntimeError, "ernel")
    assert stage.largest == 4


def test_codes_that_a_checkpoint_cannot_read_are_refused_before_anyone_waits_for_them(
    stage: Stage, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without an audio tokenizer still sings from text."""
    before = stage.together(neighbours)
    monkeypatch.setattr(stage.booths[TURBO].parts.pipeline, "audio_tokenizer", None)
    with stage.held():
        first = stage.submit(neighbours[0])
        with pytest.raises(ValueError, match="no audio tokenizer"):
            stage.submit(order_for(tmp_path, audio_code_string="<|audio_code_5|>" * 5))
        others = [stage.submit(order) for order in neighbours[1:]]
    for performance, other in zip((first, *others), before, strict=True):
        assert_same(stage.result(performance), other)


def test_a_job_of_two_songs_that_breaks_at_the_last_step_costs_no_second_decode(
    stage: Stage, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first song is ready when its second one breaks: the job has failed, and nothing of it is decoded."""
    poisoned = order_for(tmp_path, audio_duration=0.7, inference_steps=3, seeds=(66, 67))
    advance, sound, heard = Sample.advance, ModelRunner.sound, []

    def breaking(self: Sample, velocities: Any) -> None:
        if self.frames == 18 and self.step == 2 and seed_of(self) == 67:
            raise ValueError("so close")
        advance(self, velocities)

    def listening(self: ModelRunner, songs: Sequence[Sample], tiles: int) -> Any:
        heard.append([song.frames for song in songs])
        return sound(self, songs, tiles)

    monkeypatch.setattr(Sample, "advance", breaking)
    monkeypatch.setattr(ModelRunner, "sound", listening)
    assert_only_the_middle_one_fails(stage, neighbours, poisoned, ValueError, "so close")
    assert heard == [[13, 23, 8], [13, 23, 8]]


def test_a_cancelled_job_leaves_the_pack_within_a_step(
    stage: Stage, neighbours: list[Render], poisoned: Render
) -> None:
    """It is given up during its second step, and no third one is taken."""
    enough = threading.Event()
    watch = RequestCallbacks(enough.is_set, lambda done: enough.set() if done * POISONED > 1.5 else None)
    with stage.held():
        middle = stage.submit(poisoned, watch)
        performances = [stage.submit(order) for order in neighbours]
    found = [stage.result(performance) for performance in performances]
    with pytest.raises(Cancelled):
        stage.result(middle)
    assert [sum(map(is_poisoned, pack.songs)) for pack in stage.packs] == [1, 1, 0]
    assert [len(pack.songs) for pack in stage.packs] == [4, 4, 3]
    for one, other in zip(found, stage.together(neighbours), strict=True):
        assert_same(one, other)


def test_a_job_that_is_given_up_while_it_waits_never_starts(stage: Stage, neighbours: list[Render]) -> None:
    with stage.held():
        given_up = stage.submit(neighbours[0], RequestCallbacks(cancelled=lambda: True))
        performance = stage.submit(neighbours[1])
    with pytest.raises(Cancelled):
        stage.result(given_up)
    stage.result(performance)
    assert {len(pack.songs) for pack in stage.packs} == {1}


def test_a_lone_job_starts_without_company_and_others_join_it(stage: Stage, neighbours: list[Render]) -> None:
    """The second job is only sent once the first one has taken a step."""
    begun, follow = threading.Event(), threading.Event()

    def progressed(_done: float) -> None:
        begun.set()
        assert follow.wait(WITHIN_S)

    first = stage.submit(neighbours[0], RequestCallbacks(progressed=progressed))
    assert begun.wait(WITHIN_S)
    assert [len(pack.songs) for pack in stage.packs] == [1]
    second = stage.submit(neighbours[1])
    follow.set()
    stage.result(first), stage.result(second)
    assert [pack.steps for pack in stage.packs] == [(0,), (1, 0), (2, 1), (2,)]


def test_two_models_take_turns_step_by_step(stage: Stage, tmp_path: Path) -> None:
    """Three turbo songs do not make the base model's one wait longer than one step."""
    orders = [
        order_for(tmp_path, model=model, audio_duration=0.5, inference_steps=4, seeds=(index,))
        for index, model in enumerate((TURBO, TURBO, TURBO, BASE))
    ]
    packed = stage.together(orders)
    models = [pack.model for pack in stage.packs]
    assert len(models) == 8
    assert all(one != other for one, other in pairwise(models))
    for one, order in zip(packed, orders, strict=True):
        assert_same(one, stage.alone(order))


def test_jobs_wait_while_others_hold_the_memory_and_go_on_in_their_order(
    booths: dict[str, ModelRunner], neighbours: list[Render], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A latent frame is a byte here, and half of all bytes are a step's: 547 frames may be there at once."""
    stage = Stage(booths, MemoryBudget(limit=1094, footprint=MemoryFootprint(token=1, frame=1, tile=1)))
    watch_the_device(stage, monkeypatch)
    assert stage.budget.free == 1094
    assert stage.budget.working == 547
    lengths = (300, 240, 20, 100)
    orders = [
        order_for(tmp_path, audio_duration=frames / 25 - 0.01, inference_steps=steps, seeds=(frames,))
        for frames, steps in zip(lengths, (3, 2, 2, 1), strict=True)
    ]
    packed = stage.together(orders)
    present = [sorted(song.frames for song in pack.songs) for pack in stage.packs]
    assert all(sum(frames) <= 547 for frames in present)
    assert present[0] == [240, 300]
    assert sorted(frame for frames in present for frame in frames) == sorted([300] * 3 + [240] * 2 + [20] * 2 + [100])
    assert stage.batcher.squeezes > 0
    for one, order in zip(packed, orders, strict=True):
        assert_same(one, stage.alone(order))


# Memory that runs out


def without_memory(
    monkeypatch: pytest.MonkeyPatch, method: str, too_much: Callable[[Any], bool], owner: type = ModelRunner
) -> list[int]:
    """Let a method run out of memory when its first argument is too much. Returns how much was asked, call by call."""
    original, asked = getattr(owner, method), []

    def hungry(self: Any, first: Any, *others: Any) -> Any:
        asked.append(len(first) if isinstance(first, Sequence) else 0)
        if too_much(first):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, first, *others)

    monkeypatch.setattr(owner, method, hungry)
    return asked


def rendered(batcher: Scheduler, order: Render) -> Rendering:
    order.folder.mkdir(exist_ok=True)
    return render(RenderResources(batcher), order, lambda *_: None, lambda: False)


def arrived(stage: Stage, jobs: int) -> bool:
    return stage.batcher.in_hand >= jobs


def rendered_together(stage: Stage, orders: Sequence[Render]) -> list["Future[Rendering]"]:
    """Render jobs in threads of their own, all found by the device's thread at one moment."""
    with ThreadPoolExecutor(len(orders)) as threads:
        with stage.held():
            found = []
            for number, order in enumerate(orders, start=1):
                found.append(threads.submit(rendered, stage.batcher, order))
                wait_for(partial(arrived, stage, number))
        return found


def test_a_pack_that_is_too_much_becomes_smaller_and_stays_so(
    stage: Stage, neighbours: list[Render], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = without_memory(monkeypatch, "step", lambda songs: len(songs) > 2)
    orders = [order_for(tmp_path / str(n), audio_duration=1, inference_steps=2, seeds=(n,)) for n in range(4)]
    made = [future.result() for future in rendered_together(stage, orders)]
    assert sizes[:2] == [4, 2]
    assert sizes.count(4) == 1
    assert max(sizes[1:]) == 2
    for rendering in made:
        assert rendering.warnings == ("memory ran out with 4 songs in a pack: at most 26 tokens at a time from now on",)
    assert stage.batcher.means.squeezes == 1
    sizes.clear()
    again = stage.together(orders)
    assert max(sizes) == 2
    assert [one.notes for one in again] == [[]] * 4
    monkeypatch.undo()
    for one, order in zip(again, orders, strict=True):
        (sound,) = one.audio
        (track,) = rendered(stage.batcher, order).tracks
        torch.testing.assert_close(torch.from_numpy(decode(track.path, sample_rate=RATE, max_seconds=9)), sound)


def test_one_job_of_many_songs_that_are_too_much_together_is_packed_song_by_song(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_for(tmp_path, seeds=(1, 2, 3, 4))
    before = stage.alone(order)
    sizes = without_memory(monkeypatch, "step", lambda songs: len(songs) > 1)
    after = stage.alone(order)
    assert sizes[:3] == [4, 2, 1]
    assert set(sizes[3:]) == {1}
    assert len(after.notes) == 2
    assert_same(after, before)


def test_a_decode_that_is_too_much_takes_fewer_tiles_and_remembers_it(
    stage: Stage, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, sound, tiles_asked = stage.together(neighbours), ModelRunner.sound, []

    def hungry(self: ModelRunner, songs: Sequence[Sample], tiles: int) -> Any:
        tiles_asked.append(tiles)
        if tiles > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sound(self, songs, tiles)

    monkeypatch.setattr(ModelRunner, "sound", hungry)
    after = stage.together(neighbours)
    assert tiles_asked == [8, 4, 1]
    assert after[0].notes == [
        "memory ran out in the decode: 4 tiles at a time from now on, not 8",
        "memory ran out in the decode: 1 tiles at a time from now on, not 4",
    ]
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)
    assert stage.alone(neighbours[0]).notes == []
    assert tiles_asked == [8, 4, 1, 1]


def test_preparing_too_many_jobs_together_prepares_fewer_and_remembers_it(
    stage: Stage, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stage.together(neighbours)
    asked = without_memory(monkeypatch, "songs", lambda drafts: len(drafts) > 1)
    after = stage.together(neighbours)
    assert asked == [3, 1, 1, 1]
    assert stage.batcher.means.jobs == 1
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)
    asked.clear()
    stage.together(neighbours)
    assert asked == [1, 1, 1]


def test_a_cover_that_is_prepared_twice_is_the_same_song(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out for the second of two covers: the first one, ready by then, is prepared again."""
    sources = Sources(source=recording(tmp_path / "source", seconds=0.8, hz=220))
    orders = [order_for(tmp_path, task_type="cover", seeds=(seed,), sources=sources) for seed in (1, 2)]
    before = stage.together(orders)
    calls = iter(range(9))
    without_memory(monkeypatch, "_material", lambda draft: next(calls) == 1, owner=Conditioner)
    after = stage.together(orders)
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)


def test_models_are_offloaded_before_a_job_gets_the_device_to_itself(
    stage: Stage, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card that this needs is played by a note; nothing has moved on this device."""
    notes = ["models wait in RAM"]
    hungry = iter((True, False))
    monkeypatch.setattr(Scheduler, "_offload", lambda self: notes.pop() if notes else None)
    before = stage.alone(neighbours[0])
    notes.append("models wait in RAM")
    without_memory(monkeypatch, "step", lambda songs: next(hungry, False))
    after = stage.alone(neighbours[0])
    assert after.notes == ["models wait in RAM"]
    assert_same(after, before)


def test_the_whole_ladder_down_to_the_job_that_fails(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job never fits. It is given less company, a freed card, the device to itself, and only then it fails."""
    offloads = ["models wait in RAM"]
    monkeypatch.setattr(Scheduler, "_offload", lambda self: offloads.pop() if offloads else None)
    orders = [order_for(tmp_path / str(n), audio_duration=1, inference_steps=3, seeds=(n,)) for n in range(3)]
    giant = order_for(tmp_path / "giant", audio_duration=4, inference_steps=3, seeds=(9,))
    before = stage.together(orders)
    packs: list[list[int]] = []
    step = ModelRunner.step

    def hungry(self: ModelRunner, songs: Sequence[Sample], lora: Any) -> Any:
        packs.append([song.frames for song in songs])
        if any(song.frames == 100 for song in songs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, songs, lora)

    monkeypatch.setattr(ModelRunner, "step", hungry)
    futures = rendered_together(stage, [orders[0], giant, *orders[1:]])
    with pytest.raises(ResourceExhausted, match="too little memory"):
        futures[1].result()
    assert packs[0] == [25, 100, 25, 25]
    assert packs.count([100]) == 3  # before the offload, after it, and alone
    survivors = [futures[index].result() for index in (0, 2, 3)]
    for rendering, other in zip(survivors, before, strict=True):
        (track,) = rendering.tracks
        sound = torch.from_numpy(decode(track.path, sample_rate=RATE, max_seconds=9))
        torch.testing.assert_close(sound, other.audio[0], rtol=0, atol=1e-5)
        assert rendering.warnings[0].startswith("memory ran out with 4 songs in a pack")
    assert not offloads


def test_a_job_with_the_device_to_itself_says_so_and_equals_itself(
    stage: Stage, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job fits only when the others hold nothing: it is begun anew, SDE noise and all."""
    shy = order_for(neighbours[0].folder, audio_duration=4, inference_steps=3, infer_method="sde", seeds=(9,))
    before = stage.alone(shy)
    stage.batcher.means.tokens = 1  # no packs any more
    present: set[BatchRequest] = set()
    step = ModelRunner.step

    def hungry(self: ModelRunner, songs: Sequence[Sample], lora: Any) -> Any:
        present.clear()
        present.update(take for take in stage.batcher._active if not take.over)
        if any(song.frames == 100 and song.step == 1 for song in songs) and len(present) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, songs, lora)

    monkeypatch.setattr(ModelRunner, "step", hungry)
    found, *others = stage.together([shy, *neighbours])
    assert found.notes[-1] == "memory ran out: the job was begun anew with the device to itself"
    assert_same(found, before)
    assert all("begun anew" not in note for one in others for note in one.notes)
    for one, other in zip(others, stage.together(neighbours), strict=True):
        assert_same(one, other)


def test_memory_that_runs_out_in_a_songs_own_arithmetic_is_no_reason_to_fail(
    stage: Stage, neighbours: list[Render], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the pass through the DiT there is guidance and the scheduler's step, and both allocate."""
    before, advance = stage.together(neighbours), Sample.advance
    hungry = iter((False, False, True))

    def short(self: Sample, velocities: Any) -> None:
        if next(hungry, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(self, velocities)

    monkeypatch.setattr(Sample, "advance", short)
    after: list[Result] = stage.together(neighbours)
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)
