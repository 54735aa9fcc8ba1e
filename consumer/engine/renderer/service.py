# SPDX-License-Identifier: Apache-2.0
"""The renderer's end of the pipe: orders in, answers out, a lane for each order at work.

Orders wait here, not in the consumer, so that a lane that falls free goes on at once.
"""

import queue
import threading
from collections.abc import Callable
from typing import NoReturn

import structlog

from consumer.engine.messages import Broken, Done, FromEngine, Listen, Progressed, Render, Stop, ToEngine
from consumer.engine.renderer.faults import is_fatal
from consumer.engine.renderer.lane import Lane
from consumer.engine.renderer.render import listen, render
from consumer.engine.renderer.studio import Studio
from consumer.errors import ConsumerError
from consumer.job import Heard, Rendering

Say = Callable[[FromEngine], None]
Leave = Callable[[BaseException], NoReturn]

log = structlog.get_logger()


class Service:
    """Hands orders to lanes. ``leave`` is called when the device is lost and only a new process can help."""

    def __init__(self, studio: Studio, say: Say, leave: Leave, *, max_input_s: float) -> None:
        self._say = say
        self._leave = leave
        self._max_input_s = max_input_s
        self._waiting: queue.SimpleQueue[Render | Listen] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        for number, lane in enumerate(studio.lanes):
            threading.Thread(target=self._work, args=(lane,), name=f"lane {number}", daemon=True).start()

    def take(self, message: ToEngine) -> None:
        """Accept an order, or the word that nobody waits for one any more."""
        match message:
            case Render() | Listen():
                self._waiting.put(message)
            case Stop(order=number):
                self._stopped.add(number)

    def _work(self, lane: Lane) -> None:
        while True:
            order = self._waiting.get()
            try:
                self._say(self._answer(lane, order))
            finally:
                self._stopped.discard(order.order)

    def _answer(self, lane: Lane, order: Render | Listen) -> FromEngine:
        try:
            return Done(order=order.order, result=self._result(lane, order))
        except ConsumerError as error:
            if error.__cause__ is not None and is_fatal(error.__cause__):
                self._leave(error.__cause__)
            return Broken(order=order.order, code=error.code, reason=str(error))

    def _result(self, lane: Lane, order: Render | Listen) -> Rendering | Heard:
        if isinstance(order, Listen):
            return listen(lane, order, max_input_s=self._max_input_s)

        def report(fraction: float, stage: str) -> None:
            self._say(Progressed(order=order.order, fraction=fraction, stage=stage))

        return render(lane, order, report, lambda: order.order in self._stopped, max_input_s=self._max_input_s)
