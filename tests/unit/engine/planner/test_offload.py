# SPDX-License-Identifier: Apache-2.0
"""Offloading: where the model is before, while and after something is written."""

from collections.abc import Sequence

import torch

from acestep_consumer.engine.planner.backend import Codes, Generation, Sampling, Written
from acestep_consumer.engine.planner.offload import OffloadedBackend


class Model:
    """Remembers where it was sent."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def to(self, place: object) -> None:
        self.places.append(str(place))


class OneStep:
    """A backend that is done with everything after one step."""

    def __init__(self) -> None:
        self.writing: list[int] = []

    @property
    def idle(self) -> bool:
        return not self.writing

    def add(self, number: int, generation: Generation) -> None:
        self.writing.append(number)

    def drop(self, number: int) -> None:
        self.writing.remove(number)

    def step(self) -> Sequence[Written]:
        done, self.writing = self.writing, []
        return [Written(number, 1, tokens=(0,)) for number in done]


def offloaded() -> tuple[OffloadedBackend, Model]:
    model = Model()
    return OffloadedBackend(model, torch.device("meta"), OneStep), model


def generation() -> Generation:
    return Generation(prompt=(1,), unconditional=None, constraint=Codes(1), sampling=Sampling(seed=1))


def test_the_model_waits_in_ram_and_comes_for_the_first_sequence_only() -> None:
    backend, model = offloaded()
    assert (model.places, backend.idle) == (["cpu"], True)
    backend.add(1, generation())
    backend.add(2, generation())
    assert (model.places, backend.idle) == (["cpu", "meta"], False)


def test_it_leaves_with_the_last_sequence_and_comes_back_for_the_next() -> None:
    backend, model = offloaded()
    backend.add(1, generation())
    assert [news.number for news in backend.step()] == [1]
    assert (model.places, backend.idle) == (["cpu", "meta", "cpu"], True)
    backend.add(2, generation())
    backend.drop(2)
    assert model.places == ["cpu", "meta", "cpu", "meta", "cpu"]
    assert backend.step() == ()
