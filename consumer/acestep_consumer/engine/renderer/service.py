# SPDX-License-Identifier: Apache-2.0
"""The renderer's request handler: each request has a thread of its own, and all of them share the device's thread."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import structlog
import torch

from acestep_consumer.audio.encoding.pool import EncoderPool
from acestep_consumer.concurrency.slots import RankedSlots
from acestep_consumer.config.cores import usable_cores
from acestep_consumer.config.logs import set_log_level
from acestep_consumer.domain.errors import ConsumerError, DiskFull
from acestep_consumer.domain.job import Rendering, TokenizedSource
from acestep_consumer.engine.messages import (
    Done,
    EngineStats,
    FromEngine,
    Progressed,
    Render,
    RequestFailed,
    ScratchFull,
    SetLogLevel,
    SetMemoryShare,
    Stop,
    ToEngine,
    TokenizeAudio,
)
from acestep_consumer.engine.renderer.errors import is_fatal
from acestep_consumer.engine.renderer.render import render, tokenize_audio
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.startup import RendererRuntime
from acestep_consumer.policy.scoring import BUILT_IN, ScoreTable
from acestep_schemas.events import ErrorCode

Send = Callable[[FromEngine], None]
OnDeviceLost = Callable[[BaseException], NoReturn]

STATS_INTERVAL_S = 1.0
PROGRESS_INTERVAL_S = 0.2
_MAX_THREADS = 1024
_GIB = 2**30

log = structlog.get_logger()


class RendererService:
    """Answers requests.

    ``on_device_lost`` is called when only a new process can use the device again. ``encoders`` encode the songs; None:
    this process does. ``scores`` weigh the measures of candidates.
    """

    def __init__(  # noqa: PLR0913 - each is named
        self,
        runtime: RendererRuntime,
        send: Send,
        on_device_lost: OnDeviceLost,
        *,
        max_input_s: float,
        encoders: EncoderPool | None = None,
        scores: ScoreTable = BUILT_IN,
    ) -> None:
        self._runtime = runtime
        self._send = send
        self._on_device_lost = on_device_lost
        self._resources = RenderResources(
            runtime.scheduler,
            max_input_s,
            RankedSlots(usable_cores()),
            encoders,
            tags=runtime.settings.tags,
            scores=scores,
            keep_latents=runtime.settings.keep_latents,
        )
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="request")
        # By request id: set when the request is stopped.
        self._pending: dict[int, threading.Event] = {}
        threading.Thread(target=self._report_stats, name="stats", daemon=True).start()

    def handle(self, message: ToEngine) -> None:
        """Start a request, stop one, or change the memory share or the log level."""
        match message:
            case Render() | TokenizeAudio():
                stop = self._pending[message.request_id] = threading.Event()
                self._threads.submit(self._process, message, stop)
            case Stop(request_id=request_id):
                # One that was answered meanwhile is not pending any more, and leaves nothing behind.
                if pending := self._pending.get(request_id):
                    pending.set()
            case SetMemoryShare(memory_gb=memory):
                self._threads.submit(self._set_memory_share, memory)
            case SetLogLevel(log_level=level):
                set_log_level(level)

    def _set_memory_share(self, memory_gb: float) -> None:
        try:
            self._runtime.set_memory_share(memory_gb)
        except Exception as error:
            log.exception("memory share not set: the process is replaced", memory_gb=memory_gb)
            # The rest is the language model's. The next process gets its share at the start.
            self._on_device_lost(error)

    def _process(self, request: Render | TokenizeAudio, stop: threading.Event) -> None:
        try:
            self._send(self._answer(request, stop))
        except Exception:
            log.exception("request not answered", task_id=request.job.task_id)
            reason = "the renderer failed on this request"
            self._send(RequestFailed(request_id=request.request_id, code=ErrorCode.RENDER_FAILED, reason=reason))
        finally:
            self._pending.pop(request.request_id, None)

    def _answer(self, request: Render | TokenizeAudio, stop: threading.Event) -> FromEngine:
        try:
            return Done(request_id=request.request_id, result=self._result(request, stop.is_set))
        except DiskFull:
            return ScratchFull(request_id=request.request_id)
        except ConsumerError as error:
            if error.__cause__ is not None and is_fatal(error.__cause__):
                self._on_device_lost(error.__cause__)
            return RequestFailed.of(request.request_id, error)

    def _result(self, request: Render | TokenizeAudio, stopped: Callable[[], bool]) -> Rendering | TokenizedSource:
        if isinstance(request, TokenizeAudio):
            return tokenize_audio(self._resources, request, stopped)
        return render(self._resources, request, self._reporter(request.request_id), stopped)

    def _reporter(self, request_id: int) -> Callable[[float, str], None]:
        """Return a callback that reports progress, a few times a second: it is called on the device's thread."""
        last, last_stage = 0.0, ""

        def report(fraction: float, stage: str) -> None:
            nonlocal last, last_stage
            now = time.monotonic()
            if fraction >= 1 or stage != last_stage or now - last >= PROGRESS_INTERVAL_S:
                last, last_stage = now, stage
                self._send(Progressed(request_id=request_id, fraction=fraction, stage=stage))

        return report

    def _report_stats(self) -> None:
        """Send the device's usage once a second while there is work, and once after the last of it."""
        reported_busy_s = -1.0
        while True:
            time.sleep(STATS_INTERVAL_S)
            scheduler = self._runtime.scheduler
            if self._pending or scheduler.clock.busy_s != reported_busy_s:
                reported_busy_s = scheduler.clock.busy_s
                try:
                    self._send(stats_of(scheduler, self._runtime.report.device, len(self._pending)))
                except Exception:  # the next time, perhaps
                    log.exception("device usage not reported")


def stats_of(scheduler: Scheduler, device: str, pending: int) -> EngineStats:
    """Return the device's usage so far."""
    stats, limit = scheduler.stats, scheduler.budget.limit
    on_gpu = torch.device(device).type == "cuda"
    return EngineStats(
        busy_s=scheduler.clock.busy_s,
        songs_done=stats.songs_done,
        audio_s=stats.audio_s,
        pending=pending,
        songs_in_pack=stats.songs_in_pack,
        tokens_in_pack=stats.tokens_in_pack,
        memory_gb=torch.cuda.memory_allocated(device) / _GIB if on_gpu else 0.0,
        memory_limit_gb=limit / _GIB if limit else 0.0,
        reductions=scheduler.reductions,
        pack_s=scheduler.pack_s,
    )
