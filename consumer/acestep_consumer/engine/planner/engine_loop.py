# SPDX-License-Identifier: Apache-2.0
"""The loop that steps a backend on the event loop, and one call per sequence in front of it.

Between two steps the event loop reads the pipe and starts new calls: both sequences of a guidance pair therefore join
between the same two steps.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from acestep_consumer.domain.errors import InvalidRequest, PlanFailed
from acestep_consumer.engine.planner.backend import Backend, Generation, SequenceOutput
from acestep_schemas.request import FieldProblem

MAX_RETRIES = 3

log = structlog.get_logger()


@dataclass(slots=True)
class _OpenSequence:
    result: asyncio.Future[SequenceOutput]
    on_progress: Callable[[int], None]


class EngineLoop:
    """Generates sequences on a backend for any number of callers. ``run`` must be running."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ids = itertools.count(1)
        self._open: dict[int, _OpenSequence] = {}
        self._work = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for the backend's memory."""
        return self._backend.waiting

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self._open) - self.waiting

    async def generate(
        self, generation: Generation, on_progress: Callable[[int], None] = lambda _: None
    ) -> tuple[int, ...]:
        """Return the tokens of one sequence; ``on_progress`` gets their count so far.

        A sequence whose guidance branches diverged is void: it is generated again, never finished without guidance.

        Raises:
            InvalidRequest: its texts are longer than the model's context.
            PlanFailed: the backend cannot generate it.
        """
        for _ in range(1 + MAX_RETRIES):
            output = await self._generate_once(generation, on_progress)
            if output.tokens is not None:
                return output.tokens
            if output.too_long:
                rule = f"is too long for the language model, together with the lyrics: {output.error}"
                raise InvalidRequest([FieldProblem(field="prompt", value="…", rule=rule)])
            if not output.out_of_step:
                raise PlanFailed(f"the language model failed: {output.error}")
            log.warning("guidance pair out of step, generating it again", tokens_lost=output.count)
        raise PlanFailed(f"guidance fell out of step {1 + MAX_RETRIES} times")

    async def run(self) -> None:
        """Step the backend while there is something to generate, for ever. An exception of the backend ends it."""
        while True:
            await self._work.wait()
            while not self._backend.idle:
                for output in self._backend.step():
                    self._deliver(output)
                await asyncio.sleep(0)
            self._work.clear()

    async def _generate_once(self, generation: Generation, on_progress: Callable[[int], None]) -> SequenceOutput:
        sequence_id = next(self._ids)
        entry = self._open[sequence_id] = _OpenSequence(asyncio.get_running_loop().create_future(), on_progress)
        self._backend.add(sequence_id, generation)
        self._work.set()
        try:
            return await entry.result
        except asyncio.CancelledError:
            self._backend.drop(sequence_id)
            raise
        finally:
            del self._open[sequence_id]

    def _deliver(self, output: SequenceOutput) -> None:
        entry = self._open.get(output.sequence_id)
        if entry is None or entry.result.done():
            return
        if output.tokens is None and output.error is None and not output.out_of_step:
            entry.on_progress(output.count)
        else:
            entry.result.set_result(output)
