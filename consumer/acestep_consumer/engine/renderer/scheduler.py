# SPDX-License-Identifier: Apache-2.0
"""The one thread that has the device: many jobs' songs, one pack after the other.

Its loop takes what has come, prepares what there is room for, takes one denoising step with one pack, and decodes what
is finished. Songs join and leave between any two steps, since each has a time step of its own; a job that comes alone
starts at once. A pack is bounded by tokens, what is on the device by bytes, and the order is that of arrival.

Jobs do not know of each other. What breaks with several in it is tried again with each alone, so that only the job
that breaks alone fails. When memory runs out, less is asked at a time (``means``), then models wait in RAM, then the
job gets the device to itself, and only then it fails.
"""

import gc
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog
import torch

from acestep_consumer.domain.errors import Cancelled
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.engine.renderer.batch_request import AudioCopy, BatchFutures, BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.cuda_graphs import allow_many_kinds
from acestep_consumer.engine.renderer.degradation import Degradation, DeviceStage
from acestep_consumer.engine.renderer.device_clock import DeviceClock
from acestep_consumer.engine.renderer.errors import is_fatal, is_out_of_memory
from acestep_consumer.engine.renderer.lora import Lora
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.pack import tokens_of
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.sample import Sample
from acestep_consumer.engine.renderer.waiting_queue import DeviceCapacity, WaitingQueue
from acestep_consumer.policy.memory_budget import MemoryBudget

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _DeviceTask:
    """Something short for the device's thread, between two packs."""

    run: Callable[[], object]
    result: "Future[object]"


@dataclass(slots=True)
class SchedulerStats:
    """What was done since the start, and the last pack."""

    songs: int = 0
    audio_s: float = 0.0
    songs_in_pack: int = 0
    tokens_in_pack: int = 0


class Scheduler:
    """Has songs made. Its methods are for any thread.

    Args:
        booths: the models by name.
        device: where they are.
        budget: what fits.
        wait_s: how long the first job of a pack waits for company.
    """

    def __init__(
        self, booths: Mapping[str, ModelRunner], device: torch.device, budget: MemoryBudget, *, wait_s: float = 0
    ) -> None:
        self._booths = booths
        self._device = device
        self._wait_s = wait_s
        self._inbox: queue.SimpleQueue[BatchRequest | _DeviceTask] = queue.SimpleQueue()
        self._line = WaitingQueue()
        self._active: list[BatchRequest] = []
        self._turn = 0
        self.budget = budget
        self.means = Degradation.of(budget)
        self.clock = DeviceClock(device)
        self.tally = SchedulerStats()
        self.models: Mapping[str, LoadedModel] = {name: booth.parts.model for name, booth in booths.items()}
        threading.Thread(target=self._work, name="device", daemon=True).start()

    def sing(
        self, model: str, arguments: PipelineArguments, lora: Lora | None, watch: RequestCallbacks
    ) -> BatchFutures:
        """Have one job's songs made. Returns at once; the futures raise what broke, ``Cancelled`` among it.

        Raises ``ValueError`` and ``TypeError`` for what the model refuses.
        """
        booth = self._booths[model]
        draft = booth.drafting.draft(arguments)
        performance = BatchFutures(tuple(Future() for _ in arguments.seeds), list(draft.warnings))
        held = len(arguments.seeds) * self.budget.held(draft.length, draft.condition_tokens)
        self._inbox.put(BatchRequest(booth, lora, draft, watch, held, performance))
        return performance

    def listen(self, model: str, source: torch.Tensor, seed: int) -> tuple[int, ...]:
        """Return the audio codes of ``source``, [channels, samples]: 5 a second. Waits for its turn."""
        return self.errand(lambda: self._booths[model].listen(source, seed))

    def errand(self, run: Callable[[], T]) -> T:
        """Run something short on the device's thread, between two packs, and return its result."""
        result: Future[object] = Future()
        self._inbox.put(_DeviceTask(run, result))
        found: T = result.result()  # type: ignore[assignment]  # a queue of many kinds cannot say which
        return found

    def rebudget(self, budget: MemoryBudget) -> None:
        """Work within another budget from now on."""
        self.budget, self.means = budget, replace(Degradation.of(budget), squeezes=self.means.squeezes)

    @property
    def squeezes(self) -> int:
        """Times that memory made the device do less at once, or a job wait."""
        return self.means.squeezes + self._line.waits

    @property
    def in_hand(self) -> int:
        """Jobs that are not over."""
        return len(self._active) + len(self._line.takes) + self._inbox.qsize()

    def _work(self) -> None:
        allow_many_kinds()
        with torch.no_grad(), self._on_device():
            while True:
                try:
                    self._receive()
                    self._drop_cancelled()
                    self._admit()
                    self._step()
                    self._decode()
                    self._rest()
                except Exception as error:  # noqa: BLE001 - everything above handles its own; the device is lost
                    self._give_up(error)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Kernels go to the thread's current card and stream. A recording cannot be made on the default stream."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
            with torch.cuda.stream(stream):
                yield

    def _receive(self) -> None:
        """Take what has come; with nothing else to do, wait for it."""
        if not self._active and not self._line.takes:
            self._file(self._inbox.get())
            self._gather()
        while not self._inbox.empty():
            self._file(self._inbox.get())

    def _gather(self) -> None:
        """Give the first job's company a moment to arrive: jobs often come in bursts."""
        until = time.monotonic() + self._wait_s
        while (left := until - time.monotonic()) > 0:
            try:
                self._file(self._inbox.get(timeout=left))
            except queue.Empty:
                return

    def _file(self, order: BatchRequest | _DeviceTask) -> None:
        if isinstance(order, BatchRequest):
            self._line.takes.append(order)
            return
        try:
            order.result.set_result(order.run())
        except Exception as error:  # noqa: BLE001 - the one who asked hears of it
            order.result.set_exception(error)

    def _drop_cancelled(self) -> None:
        for take in (*self._line.takes, *self._active):
            if take.watch.cancelled():
                take.fail(Cancelled())
        self._forget_over()

    def _admit(self) -> None:
        """Prepare waiting jobs, in their order, as far as there is room."""
        while takes := self._line.next_batch(self._room(), self.means.jobs):
            before = len(self._line.takes)
            self._attempt(DeviceStage.PREPARE, takes, self._prepare)
            if len(self._line.takes) == before:
                return  # memory ran out: the next round tries with less

    def _room(self) -> DeviceCapacity:
        return DeviceCapacity(self._active, self.budget, sum(booth.lora_bytes for booth in self._booths.values()))

    def _prepare(self, takes: Sequence[BatchRequest]) -> None:
        booth, lora = takes[0].kind
        prepared = booth.songs([take.draft for take in takes], lora)
        for take, songs in zip(takes, prepared, strict=True):
            self._line.leave(take)
            if isinstance(songs, Exception):
                take.fail(songs)
            else:
                take.songs = songs
                self._active.append(take)

    def _step(self) -> None:
        """Take one step with one pack; kinds of work that cannot share a pack take turns."""
        kinds = list(dict.fromkeys(take.kind for take in self._active if take.unfinished))
        if not kinds:
            return
        self._turn += 1
        kind = kinds[self._turn % len(kinds)]
        pack = self._pack_of([take for take in self._active if take.kind == kind and take.unfinished])
        self._attempt(DeviceStage.STEP, list(pack), lambda takes: self._advance({take: pack[take] for take in takes}))

    def _pack_of(self, takes: Sequence[BatchRequest]) -> dict[BatchRequest, list[Sample]]:
        """Return the oldest songs that are few enough tokens together; at least one."""
        pack: dict[BatchRequest, list[Sample]] = {}
        room = self.means.tokens
        for take in takes:
            for song in take.unfinished:
                tokens = _tokens(take, [song])
                if pack and tokens > room:
                    return pack
                pack.setdefault(take, []).append(song)
                room -= tokens
        return pack

    def _advance(self, pack: Mapping[BatchRequest, Sequence[Sample]]) -> None:
        takes = list(pack)
        booth, lora = takes[0].kind
        songs = [song for some in pack.values() for song in some]
        self.tally.songs_in_pack = len(songs)
        self.tally.tokens_in_pack = sum(_tokens(take, some) for take, some in pack.items())
        velocities = iter(booth.step(songs, lora))
        for take, some in pack.items():
            try:
                for song, flow in [(song, next(velocities)) for song in some]:
                    song.advance(flow)
                take.tell()
            except Exception as error:
                if is_fatal(error):
                    raise
                # The other songs have their velocities. This one's momentum and noise may be half a step on.
                if is_out_of_memory(error):
                    self._isolate([take], error)
                else:
                    self._fail(take, error)

    def _decode(self) -> None:
        takes = [take for take in self._active if take.finished]
        if takes:
            # Models share a VAE or not; one booth's songs at a time.
            booth = takes[0].booth
            self._attempt(DeviceStage.DECODE, [take for take in takes if take.booth is booth], self._sound)
        self._forget_over()

    def _sound(self, takes: Sequence[BatchRequest]) -> None:
        songs = [(take, song) for take in takes for song in take.finished]
        sounds = takes[0].booth.sound([song for _, song in songs], self.means.tiles)
        for (take, song), audio in zip(songs, sounds, strict=True):
            take.deliver(song, AudioCopy.leaving(audio))
            self.tally.songs += 1
            self.tally.audio_s += song.frames / take.booth.parts.model.latent_rate

    def _attempt(
        self, stage: DeviceStage, takes: Sequence[BatchRequest], work: Callable[[Sequence[BatchRequest]], None]
    ) -> None:
        """Do some work for several jobs; if it breaks, for each alone; what breaks alone has failed."""
        try:
            with self.clock.working():
                work(takes)
        except Exception as error:
            if is_fatal(error):
                raise
            if is_out_of_memory(error):
                self._squeeze(stage, takes, error)
            elif len(takes) == 1:
                self._fail(takes[0], error)
            else:
                log.warning("a pack broke; each job is tried alone", stage=stage.value, jobs=len(takes), exc_info=error)
                for take in takes:
                    self._attempt(stage, [take], work)

    def _squeeze(self, stage: DeviceStage, takes: Sequence[BatchRequest], error: Exception) -> None:
        """Memory ran out: go one step down the ladder; the work is tried again in the next round."""
        # Frames that the error came through hold what they had allocated.
        traceback.clear_frames(error.__traceback__)
        self._free()
        members = self.tally.songs_in_pack if stage is DeviceStage.STEP else len(takes)
        done = self.means.step_down(stage, members, self.tally.tokens_in_pack) or self._offload()
        if done is None:
            self._isolate(takes, error)
            return
        log.warning("out of memory", stage=stage.value, jobs=len(takes), done=done)
        for take in takes:
            take.performance.notes.append(done)

    def _isolate(self, takes: Sequence[BatchRequest], error: Exception) -> None:
        """Give each job the device to itself, once."""
        for take in reversed(takes):  # so that the first of them is at the head of the line
            if take.alone or len(self._active) + len(self._line.takes) == 1:
                self._fail(take, error)
                continue
            take.performance.notes.append("memory ran out: the job was begun anew with the device to itself")
            take.alone, take.songs = True, ()
            take.draft = take.booth.drafting.draft(take.draft.arguments)
            if take in self._active:
                self._active.remove(take)
                self._line.takes.appendleft(take)

    def _offload(self) -> str | None:
        """Let models wait in RAM from now on; None where that frees nothing."""
        if self._device.type != "cuda" or any(booth.parts.card is not None for booth in self._booths.values()):
            return None
        card = ModuleSwapper(self._device)
        for booth in self._booths.values():
            booth.offload(card)
        torch.cuda.empty_cache()
        return "memory ran out: models wait in RAM between uses from now on"

    def _free(self) -> None:
        for booth in self._booths.values():
            booth.forget()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _fail(self, take: BatchRequest, error: Exception) -> None:
        take.fail(error)
        self._line.leave(take)
        if take in self._active:
            self._active.remove(take)

    def _forget_over(self) -> None:
        self._active = [take for take in self._active if not take.over]
        self._line.takes = deque(take for take in self._line.takes if not take.over)

    def _rest(self) -> None:
        if not self._active and not self._line.takes:
            self.clock.finish()
            for booth in self._booths.values():
                booth.rest()

    def _give_up(self, error: Exception) -> None:
        """Tell everyone who waits. Whoever sees that the device is lost ends the process."""
        for take in (*self._line.takes, *self._active):
            take.fail(error)
        self._forget_over()


def _tokens(take: BatchRequest, songs: Sequence[Sample]) -> int:
    """Return the tokens of the songs' voices at their next step."""
    patch = take.booth.parts.dit.patch
    return sum(tokens_of([song.frames], patch)[0] * len(song.voices()) for song in songs)
