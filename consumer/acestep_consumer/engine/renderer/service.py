# SPDX-License-Identifier: Apache-2.0
"""The renderer's end of the pipe: orders in, answers out. Each order has a thread; the device has one for all."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import structlog
import torch

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
    SetMemoryShare,
    Stop,
    ToEngine,
    TokenizeAudio,
)
from acestep_consumer.engine.renderer.errors import is_fatal
from acestep_consumer.engine.renderer.render import RenderResources, listen, render
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.engine.renderer.startup import RendererRuntime

Say = Callable[[FromEngine], None]
Leave = Callable[[BaseException], NoReturn]

VITALS_EVERY_S = 1.0
REPORT_EVERY_S = 0.2
_MOST_ORDERS = 1024
_GIB = 2**30

log = structlog.get_logger()


class RendererService:
    """Hands orders to threads. ``leave`` is called when the device is lost and only a new process can help."""

    def __init__(self, studio: RendererRuntime, say: Say, leave: Leave, *, max_input_s: float) -> None:
        self._studio = studio
        self._say = say
        self._leave = leave
        self._equipment = RenderResources(studio.batcher, max_input_s, threading.BoundedSemaphore(os.cpu_count() or 1))
        self._stopped: set[int] = set()
        self._orders = ThreadPoolExecutor(_MOST_ORDERS, thread_name_prefix="order")
        self._open: set[int] = set()
        self._began = time.monotonic()
        threading.Thread(target=self._tell_vitals, name="vitals", daemon=True).start()

    def take(self, message: ToEngine) -> None:
        """Accept an order, or the word that nobody waits for one any more."""
        match message:
            case Render() | TokenizeAudio():
                self._open.add(message.order)
                self._orders.submit(self._work, message)
            case Stop(order=number):
                self._stopped.add(number)
            case SetMemoryShare(memory_gb=memory):
                self._orders.submit(self._studio.share, memory)

    def _work(self, order: Render | TokenizeAudio) -> None:
        try:
            self._say(self._answer(order))
        finally:
            self._open.discard(order.order)
            self._stopped.discard(order.order)

    def _answer(self, order: Render | TokenizeAudio) -> FromEngine:
        try:
            return Done(order=order.order, result=self._result(order))
        except DiskFull:
            return ScratchFull(order=order.order)
        except ConsumerError as error:
            if error.__cause__ is not None and is_fatal(error.__cause__):
                self._leave(error.__cause__)
            return RequestFailed(order=order.order, code=error.code, reason=str(error))

    def _result(self, order: Render | TokenizeAudio) -> Rendering | TokenizedSource:
        def stopped() -> bool:
            return order.order in self._stopped

        if isinstance(order, TokenizeAudio):
            return listen(self._equipment, order, stopped)
        return render(self._equipment, order, self._reporter(order.order), stopped)

    def _reporter(self, number: int) -> Callable[[float, str], None]:
        """Pass progress on, but not each of hundreds of steps a second: that would be work for the device's thread."""
        last = 0.0

        def report(fraction: float, stage: str) -> None:
            nonlocal last
            now = time.monotonic()
            if fraction >= 1 or now - last >= REPORT_EVERY_S:
                last = now
                self._say(Progressed(order=number, fraction=fraction, stage=stage))

        return report

    def _tell_vitals(self) -> None:
        """Say how the device is used, once a second; the last word after the work is that it rests."""
        told = -1.0
        while True:
            time.sleep(VITALS_EVERY_S)
            batcher = self._studio.batcher
            if self._open or batcher.clock.busy_s != told:
                told = batcher.clock.busy_s
                self._say(
                    vitals_of(batcher, self._studio.report.device, len(self._open), time.monotonic() - self._began)
                )


def vitals_of(batcher: Scheduler, device: str, in_hand: int, ready_s: float) -> EngineStats:
    """Return how the device is used."""
    tally, limit = batcher.tally, batcher.budget.limit
    on_card = torch.device(device).type == "cuda"
    return EngineStats(
        ready_s=ready_s,
        busy_s=batcher.clock.busy_s,
        songs_done=tally.songs,
        audio_s=tally.audio_s,
        in_hand=in_hand,
        songs_in_pack=tally.songs_in_pack,
        tokens_in_pack=tally.tokens_in_pack,
        memory_gb=torch.cuda.memory_allocated(device) / _GIB if on_card else 0.0,
        memory_limit_gb=limit / _GIB if limit else 0.0,
        squeezes=batcher.squeezes,
    )
