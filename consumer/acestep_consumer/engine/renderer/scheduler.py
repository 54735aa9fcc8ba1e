# SPDX-License-Identifier: Apache-2.0
"""Continuous batching on the device's one thread: many jobs' songs share forward passes, step by step.

The loop receives jobs, prepares those that fit, takes one denoising step with one batch, and decodes finished songs.
Samples join and leave between any two steps, since each has a time step of its own; a lone job starts at once. A batch
is bounded by tokens, the load of the device by bytes. Jobs that have begun go first, then the others by rank.

Jobs are isolated from each other: when a batch fails, each of its jobs is retried alone, so that only the faulty one
fails. When memory runs out, batches become smaller (``Degradation``), then the models are offloaded to RAM, then the
job is restarted alone on the device, and only then it fails.
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
from math import inf
from typing import TypeVar

import structlog
import torch

from acestep_consumer.concurrency.priority import insert
from acestep_consumer.domain.errors import Cancelled
from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.engine.renderer.batch_request import AudioCopy, BatchFutures, BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.degradation import Degradation, DeviceStage
from acestep_consumer.engine.renderer.denoising.cuda_graphs import raise_recompile_limit
from acestep_consumer.engine.renderer.denoising.pack import tokens_of
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.device_clock import DeviceClock
from acestep_consumer.engine.renderer.errors import is_fatal, is_out_of_memory
from acestep_consumer.engine.renderer.latents import LatentSpace
from acestep_consumer.engine.renderer.lora import Loras
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.waiting_queue import DeviceCapacity, WaitingQueue
from acestep_consumer.policy.memory_budget import MemoryBudget

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _DeviceTask:
    """A short call for the device's thread, run between two batches."""

    run: Callable[[], object]
    result: "Future[object]"


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the start, and the size of the last batch."""

    songs_done: int = 0
    audio_s: float = 0.0
    songs_in_pack: int = 0
    tokens_in_pack: int = 0
    audio_s_in_pack: float = 0.0


class Scheduler:
    """Batches jobs on one device. Its methods may be called from any thread.

    Args:
        runners: the models by name.
        device: where they compute.
        budget: the memory and the tokens that may be used.
        wait_s: how long an idle device waits for more jobs to batch with the first.
    """

    def __init__(
        self, runners: Mapping[str, ModelRunner], device: torch.device, budget: MemoryBudget, *, wait_s: float = 0
    ) -> None:
        self._runners = runners
        self._device = device
        self._wait_s = wait_s
        self._inbox: queue.SimpleQueue[BatchRequest | _DeviceTask] = queue.SimpleQueue()
        self._waiting = WaitingQueue()
        self._active: list[BatchRequest] = []
        self._steps = 0
        self.budget = budget
        self.degradation = Degradation.of(budget)
        self.clock = DeviceClock(device)
        self.stats = SchedulerStats()
        self.models: Mapping[str, LoadedModel] = {name: runner.parts.model for name, runner in runners.items()}
        self.latent_spaces: Mapping[str, LatentSpace] = {n: runner.parts.latent_space for n, runner in runners.items()}
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def submit(  # noqa: PLR0913 - a job, and how it is queued
        self,
        model: str,
        arguments: PipelineArguments,
        lora: Loras | None,
        callbacks: RequestCallbacks,
        *,
        rank: float = 0.0,
        keep_latents: bool = False,
    ) -> BatchFutures:
        """Queue one job by its rank. Returns at once; the futures raise the job's error, ``Cancelled`` among them.

        With ``keep_latents`` the songs have their final latents with them.

        Raises ``ValueError`` and ``TypeError`` for arguments that the model refuses.
        """
        runner = self._runners[model]
        prepared = runner.preparer.prepare(arguments)
        futures = BatchFutures(tuple(Future() for _ in arguments.seeds), list(prepared.warnings), prepared.lyrics)
        held = len(arguments.seeds) * self.budget.held(prepared.length, prepared.condition_tokens)
        audio = dict(enumerate(futures.audio))
        self._inbox.put(
            BatchRequest(
                runner, lora, prepared, callbacks, held, audio, futures.warnings, rank=rank, keep_latents=keep_latents
            )
        )
        return futures

    def tokenize_audio(self, model: str, source: torch.Tensor, seed: int) -> tuple[int, ...]:
        """Return the audio codes of ``source``, [channels, samples]: 5 a second. Blocks until the device is free."""
        return self.run_on_device(lambda: self._runners[model].tokenize_audio(source, seed))

    def encode_audio(self, model: str, source: torch.Tensor, seed: int, *, tiled: bool) -> torch.Tensor:
        """Return latents of ``source``, [channels, samples], as a song of this seed has them, [frames, channels].

        Blocks until the device is free.
        """
        return self.run_on_device(lambda: self._runners[model].encode_audio(source, seed, tiled=tiled))

    def run_on_device(self, run: Callable[[], T]) -> T:
        """Run a short call on the device's thread, between two batches, and return its result."""
        result: Future[object] = Future()
        self._inbox.put(_DeviceTask(run, result))
        found: T = result.result()  # type: ignore[assignment]  # one queue carries calls of every result type
        return found

    def set_budget(self, budget: MemoryBudget) -> None:
        """Replace the budget; earlier reductions are undone, and stay counted."""
        self.budget, self.degradation = budget, replace(Degradation.of(budget), reductions=self.degradation.reductions)

    def frame_s(self, model: str) -> float:
        """Return the seconds of one token of the model's DiT, the frame of an alignment."""
        parts = self._runners[model].parts
        return parts.dit.patch / parts.model.latent_rate

    @property
    def reductions(self) -> int:
        """Times that a lack of memory reduced what the device does at once, or made a job wait."""
        return self.degradation.reductions + self._waiting.memory_waits

    @property
    def pack_s(self) -> float:
        """Seconds of audio in one full batch, at the last step's tokens a second; 0: not known.

        Not known on a CPU either, whose throughput is much the same with whatever is in a batch.
        """
        if not self.stats.tokens_in_pack or self._device.type == "cpu":
            return 0.0
        return self.degradation.tokens * self.stats.audio_s_in_pack / self.stats.tokens_in_pack

    @property
    def pending(self) -> int:
        """Jobs that are not completed."""
        return len(self._active) + len(self._waiting.requests) + self._inbox.qsize()

    def _run(self) -> None:
        raise_recompile_limit()
        with torch.no_grad(), self._on_device():
            while True:
                try:
                    self._receive()
                    self._drop_cancelled()
                    self._admit()
                    self._step()
                    self._align()
                    self._decode()
                    self._rest_if_idle()
                except Exception as error:  # noqa: BLE001 - everything above handles its own; the device is lost
                    self._fail_all(error)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Select the device and a stream for this thread. CUDA graphs cannot be captured on the default stream."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
            with torch.cuda.stream(stream):
                yield

    def _receive(self) -> None:
        """Take what has arrived; with nothing else to do, wait for it."""
        if not self._active and not self._waiting.requests:
            self._accept(self._inbox.get())
            self._wait_for_more()
        while not self._inbox.empty():
            self._accept(self._inbox.get())

    def _wait_for_more(self) -> None:
        """Give more jobs a moment to arrive: they often come in bursts."""
        until = time.monotonic() + self._wait_s
        while (left := until - time.monotonic()) > 0:
            try:
                self._accept(self._inbox.get(timeout=left))
            except queue.Empty:
                return

    def _accept(self, item: BatchRequest | _DeviceTask) -> None:
        if isinstance(item, BatchRequest):
            self._waiting.add(item)
            return
        try:
            item.result.set_result(item.run())
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            item.result.set_exception(error)

    def _drop_cancelled(self) -> None:
        for request in (*self._waiting.requests, *self._active):
            if request.callbacks.cancelled():
                request.fail(Cancelled())
        self._remove_completed()

    def _admit(self) -> None:
        """Prepare waiting jobs, in their order, as far as they fit; they are denoised in that order, too."""
        while requests := self._waiting.next_batch(self._capacity(), self.degradation.jobs):
            before = len(self._waiting.requests)
            self._attempt(DeviceStage.PREPARE, requests, self._prepare)
            if len(self._waiting.requests) == before:
                return  # memory ran out: the next round tries with fewer

    def _capacity(self) -> DeviceCapacity:
        return DeviceCapacity(self._active, self.budget, sum(runner.lora_bytes for runner in self._runners.values()))

    def _prepare(self, requests: Sequence[BatchRequest]) -> None:
        runner, lora = requests[0].batch_key
        found = runner.samples([request.prepared for request in requests], lora)
        for request, samples in zip(requests, found, strict=True):
            self._waiting.remove(request)
            if isinstance(samples, Exception):
                request.fail(samples)
            else:
                request.samples = samples
                insert(self._active, request, lambda each: -inf if each.begun else each.rank)

    def _step(self) -> None:
        """Take one step with one batch; jobs that need other weights get every second, third, ... step."""
        unfinished = [request for request in self._active if request.unfinished]
        keys = list(dict.fromkeys(request.batch_key for request in unfinished))
        if not keys:
            return
        self._steps += 1
        key = keys[self._steps % len(keys)]
        pack = self._pack_of([request for request in unfinished if request.batch_key == key])
        self._attempt(DeviceStage.STEP, list(pack), lambda some: self._advance({each: pack[each] for each in some}))

    def _pack_of(self, requests: Sequence[BatchRequest]) -> dict[BatchRequest, list[Sample]]:
        """Return the first samples that are few enough tokens together; at least one."""
        pack: dict[BatchRequest, list[Sample]] = {}
        left = self.degradation.tokens
        for request in requests:
            for sample in request.unfinished:
                tokens = _tokens(request, [sample])
                if pack and tokens > left:
                    return pack
                pack.setdefault(request, []).append(sample)
                left -= tokens
        return pack

    def _advance(self, pack: Mapping[BatchRequest, Sequence[Sample]]) -> None:
        runner, lora = next(iter(pack)).batch_key
        samples = [sample for some in pack.values() for sample in some]
        self.stats.songs_in_pack = len(samples)
        self.stats.tokens_in_pack = sum(_tokens(request, some) for request, some in pack.items())
        self.stats.audio_s_in_pack = sum(sample.frames for sample in samples) / runner.parts.model.latent_rate
        velocities = iter(runner.step(samples, lora))
        for request, some in pack.items():
            try:
                for sample, velocity in [(sample, next(velocities)) for sample in some]:
                    sample.advance(velocity)
                request.report_progress()
            except Exception as error:
                if is_fatal(error):
                    raise
                # The other samples have their velocities. This job's momentum and noise may be half a step on.
                if is_out_of_memory(error):
                    self._isolate([request], error)
                else:
                    self._fail(request, error)

    def _align(self) -> None:
        """Align denoised songs with their lyrics, where these are asked for, pack by pack."""
        while unaligned := [(request, sample) for request in self._active for sample in request.unaligned]:
            self._align_pack(first_pack(unaligned, self.degradation.tokens))

    def _align_pack(self, pack: Sequence[tuple[BatchRequest, Sample]]) -> None:
        """Align one pack, after an error each song alone. A song that cannot be aligned is delivered without times."""
        runner, lora = pack[0][0].batch_key
        try:
            with self.clock.working():
                found = runner.align([sample for _, sample in pack], lora)
                for (request, sample), matrices in zip(pack, found, strict=True):
                    request.set_matrices(sample, AudioCopy.start(matrices))
        except Exception as error:
            if is_fatal(error):
                raise
            log.warning("lyrics not aligned", songs=len(pack), exc_info=error)
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)
                self._free_caches()
            if len(pack) > 1:
                for each in pack:
                    self._align_pack([each])
                return
            ((request, sample),) = pack
            request.set_matrices(sample, None)
            why = "out of memory" if is_out_of_memory(error) else type(error).__name__
            request.warnings.append(f"the lyrics of a song could not be aligned: {why}")

    def _decode(self) -> None:
        finished = [request for request in self._active if request.finished]
        if finished:
            # Models may have different VAEs: one model's songs at a time.
            runner = finished[0].runner
            requests = [request for request in finished if request.runner is runner]
            self._attempt(DeviceStage.DECODE, requests, self._decode_finished)
        self._remove_completed()

    def _decode_finished(self, requests: Sequence[BatchRequest]) -> None:
        finished = [(request, sample) for request in requests for sample in request.finished]
        decoded = requests[0].runner.decode([sample for _, sample in finished], self.degradation.tiles)
        for (request, sample), audio in zip(finished, decoded, strict=True):
            request.deliver(sample, audio)
            self.stats.songs_done += 1
            self.stats.audio_s += sample.frames / request.runner.parts.model.latent_rate

    def _attempt(
        self, stage: DeviceStage, requests: Sequence[BatchRequest], work: Callable[[Sequence[BatchRequest]], None]
    ) -> None:
        """Do one stage for several jobs; after an error for each alone, and a job that fails alone has failed."""
        try:
            with self.clock.working():
                work(requests)
        except Exception as error:
            if is_fatal(error):
                raise
            if is_out_of_memory(error):
                self._reduce(stage, requests, error)
            elif len(requests) == 1:
                self._fail(requests[0], error)
            else:
                log.warning("batch failed, retrying each job alone", stage=stage, jobs=len(requests), exc_info=error)
                for request in requests:
                    self._attempt(stage, [request], work)

    def _reduce(self, stage: DeviceStage, requests: Sequence[BatchRequest], error: Exception) -> None:
        """Reduce what is done at once after running out of memory; the next round tries the stage again."""
        # Frames that the error came through hold what they had allocated.
        traceback.clear_frames(error.__traceback__)
        self._free_caches()
        size = self.stats.songs_in_pack if stage is DeviceStage.STEP else len(requests)
        reduction = self.degradation.step_down(stage, size, self.stats.tokens_in_pack) or self._offload()
        if reduction is None:
            self._isolate(requests, error)
            return
        log.warning("out of memory", stage=stage, jobs=len(requests), reduction=reduction)
        for request in requests:
            request.warnings.append(reduction)

    def _isolate(self, requests: Sequence[BatchRequest], error: Exception) -> None:
        """Restart each job alone on the device, once; a job that was alone already fails."""
        for request in reversed(requests):  # so that the first of them is at the head of the queue
            if request.exclusive or len(self._active) + len(self._waiting.requests) == 1:
                self._fail(request, error)
                continue
            request.warnings.append("out of memory: the job was restarted alone on the device")
            request.exclusive, request.samples = True, ()
            request.prepared = request.runner.preparer.prepare(request.prepared.arguments)
            if request in self._active:
                self._active.remove(request)
                self._waiting.requests.appendleft(request)

    def _offload(self) -> str | None:
        """Offload the models to RAM from now on; None where that frees nothing."""
        if self._device.type != "cuda" or any(runner.parts.swapper is not None for runner in self._runners.values()):
            return None
        swapper = ModuleSwapper(self._device)
        for runner in self._runners.values():
            runner.offload(swapper)
        torch.cuda.empty_cache()
        return "out of memory: models are now offloaded to RAM between uses"

    def _free_caches(self) -> None:
        for runner in self._runners.values():
            runner.free_caches()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _fail(self, request: BatchRequest, error: Exception) -> None:
        request.fail(error)
        self._waiting.remove(request)
        if request in self._active:
            self._active.remove(request)

    def _remove_completed(self) -> None:
        self._active = [request for request in self._active if not request.completed]
        self._waiting.requests = deque(request for request in self._waiting.requests if not request.completed)

    def _rest_if_idle(self) -> None:
        if not self._active and not self._waiting.requests:
            self.clock.finish()
            for runner in self._runners.values():
                runner.unload()

    def _fail_all(self, error: Exception) -> None:
        """Fail every job. The one that reports a lost device ends the process."""
        for request in (*self._waiting.requests, *self._active):
            request.fail(error)
        self._remove_completed()


def first_pack(songs: Sequence[tuple[BatchRequest, Sample]], most_tokens: int) -> list[tuple[BatchRequest, Sample]]:
    """Return the songs that are aligned in one pass: the first, and what has its weights and fits beside it."""
    pack: list[tuple[BatchRequest, Sample]] = []
    left = most_tokens
    for request, sample in songs:
        (tokens,) = tokens_of([sample.frames], request.runner.parts.dit.patch)
        if not pack or (request.batch_key == pack[0][0].batch_key and tokens <= left):
            pack.append((request, sample))
            left -= tokens
    return pack


def _tokens(request: BatchRequest, samples: Sequence[Sample]) -> int:
    """Return the tokens of the samples' branches at their next step."""
    patch = request.runner.parts.dit.patch
    return sum(tokens_of([sample.frames], patch)[0] * len(sample.branches()) for sample in samples)
