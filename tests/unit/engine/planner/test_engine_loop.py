# SPDX-License-Identifier: Apache-2.0
"""The engine loop: many callers, one stepped backend, and guidance pairs that fall out of step."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from acestep_consumer.domain.errors import InvalidRequest, PlanFailed
from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, Sampling, SequenceOutput
from acestep_consumer.engine.planner.engine_loop import EngineLoop

TOO_MANY = 777


class Counter:
    """A backend whose sequences are 0, 1, 2, …; ``bad_pairs`` fall out of step, ``poison`` cannot be written."""

    def __init__(self, bad_pairs: int = 0, poison: int | None = None) -> None:
        self.writing: dict[int, tuple[int, int]] = {}
        self.bad_pairs = bad_pairs
        self.poison = poison
        self.most_at_once = 0

    @property
    def idle(self) -> bool:
        return not self.writing

    @property
    def songs(self) -> int | None:
        return None

    @property
    def waiting(self) -> int:
        return 0

    def add(self, sequence_id: int, generation: Generation) -> None:
        assert isinstance(generation.constraint, CodeConstraint)
        self.writing[sequence_id] = (0, generation.constraint.count)

    def drop(self, sequence_id: int) -> None:
        self.writing.pop(sequence_id, None)

    def step(self) -> Sequence[SequenceOutput]:
        self.most_at_once = max(self.most_at_once, len(self.writing))
        return [self._next(sequence_id) for sequence_id in list(self.writing)]

    def _next(self, sequence_id: int) -> SequenceOutput:
        done, wanted = self.writing.pop(sequence_id)
        if wanted == self.poison:
            return SequenceOutput(sequence_id, 0, error="it is poison")
        if wanted == TOO_MANY:
            return SequenceOutput(sequence_id, 0, error="the context is 9", too_long=True)
        if done == 1 and self.bad_pairs > 0:
            self.bad_pairs -= 1
            return SequenceOutput(sequence_id, done, out_of_step=True)
        if done + 1 == wanted:
            return SequenceOutput(sequence_id, wanted, tokens=tuple(range(wanted)))
        self.writing[sequence_id] = (done + 1, wanted)
        return SequenceOutput(sequence_id, done + 1)


def codes(count: int) -> Generation:
    return Generation(prompt=(1,), unconditional=None, constraint=CodeConstraint(count), sampling=Sampling(seed=1))


@asynccontextmanager
async def engine_loop(backend: Counter) -> AsyncIterator[EngineLoop]:
    made = EngineLoop(backend)
    running = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(10):
            yield made
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_calls_are_batched_and_get_their_own_tokens() -> None:
    backend = Counter()
    async with engine_loop(backend) as made:
        results = await asyncio.gather(*(made.generate(codes(count)) for count in (3, 5, 8)))
    assert [len(tokens) for tokens in results] == [3, 5, 8]
    assert backend.most_at_once == 3


async def test_progress_is_reported_as_it_comes() -> None:
    progress: list[int] = []
    async with engine_loop(Counter()) as made:
        await made.generate(codes(4), progress.append)
    assert progress == [1, 2, 3]


async def test_a_pair_out_of_step_is_generated_again_from_the_start() -> None:
    async with engine_loop(Counter(bad_pairs=2)) as made:
        assert await made.generate(codes(4)) == (0, 1, 2, 3)


async def test_a_pair_that_never_keeps_step_fails_its_job() -> None:
    async with engine_loop(Counter(bad_pairs=100)) as made:
        with pytest.raises(PlanFailed, match="out of step 4 times"):
            await made.generate(codes(4))


async def test_a_sequence_that_cannot_be_generated_fails_alone() -> None:
    async with engine_loop(Counter(poison=7)) as made:
        good, bad = await asyncio.gather(made.generate(codes(4)), made.generate(codes(7)), return_exceptions=True)
    assert good == (0, 1, 2, 3)
    assert isinstance(bad, PlanFailed)


async def test_a_cancelled_call_drops_its_sequence() -> None:
    backend = Counter()
    async with engine_loop(backend) as made:
        endless = asyncio.create_task(made.generate(codes(10**9)))
        await asyncio.sleep(0.01)
        endless.cancel()
        await asyncio.wait((endless,))
        assert backend.idle
        assert await made.generate(codes(2)) == (0, 1)


async def test_texts_that_exceed_the_context_are_the_requests_fault() -> None:
    async with engine_loop(Counter()) as made:
        with pytest.raises(InvalidRequest) as caught:
            await made.generate(codes(TOO_MANY))
    (problem,) = caught.value.problems
    assert problem.field == "prompt"
    assert problem.rule == "is too long for the language model, together with the lyrics: the context is 9"
