# SPDX-License-Identifier: Apache-2.0
"""One call per sequence in front of a backend that writes them all together.

The backend is stepped on the event loop, and between two steps the loop reads the pipe and starts newcomers: both
sequences of a guidance pair therefore enter between the same two steps.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from acestep_consumer.domain.errors import PlanFailed
from acestep_consumer.engine.planner.backend import Backend, Generation, Written

MAX_REWRITES = 3

log = structlog.get_logger()


@dataclass(slots=True)
class _OpenSequence:
    answer: asyncio.Future[Written]
    told: Callable[[int], None]


class EngineLoop:
    """Takes sequences to a backend and brings back what was written. ``run`` must be running."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._numbers = itertools.count(1)
        self._open: dict[int, _OpenSequence] = {}
        self._work = asyncio.Event()

    async def write(self, generation: Generation, told: Callable[[int], None] = lambda _: None) -> tuple[int, ...]:
        """Return the tokens of one sequence; ``told`` hears how many there are so far.

        A sequence whose guidance pair fell out of step is void; it is written again, never finished without guidance.

        Raises:
            PlanFailed: the backend cannot write it.
        """
        for _ in range(1 + MAX_REWRITES):
            written = await self._write_once(generation, told)
            if written.tokens is not None:
                return written.tokens
            if not written.out_of_step:
                raise PlanFailed(f"the language model could not write this: {written.error}")
            log.warning("guidance pair out of step, written again", tokens_lost=written.count)
        raise PlanFailed(f"guidance fell out of step {1 + MAX_REWRITES} times")

    async def run(self) -> None:
        """Step the backend while there is something to write, for ever. What the backend raises ends it."""
        while True:
            await self._work.wait()
            while not self._backend.idle:
                for news in self._backend.step():
                    self._tell(news)
                await asyncio.sleep(0)
            self._work.clear()

    async def _write_once(self, generation: Generation, told: Callable[[int], None]) -> Written:
        number = next(self._numbers)
        entry = self._open[number] = _OpenSequence(asyncio.get_running_loop().create_future(), told)
        self._backend.add(number, generation)
        self._work.set()
        try:
            return await entry.answer
        except asyncio.CancelledError:
            self._backend.drop(number)
            raise
        finally:
            del self._open[number]

    def _tell(self, news: Written) -> None:
        entry = self._open.get(news.number)
        if entry is None or entry.answer.done():
            return
        if news.tokens is None and news.error is None and not news.out_of_step:
            entry.told(news.count)
        else:
            entry.answer.set_result(news)
