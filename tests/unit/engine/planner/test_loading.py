# SPDX-License-Identifier: Apache-2.0
"""Offloading: where the model is before, during and after a generation."""

from collections.abc import Sequence

import torch

from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, Sampling, SequenceOutput
from acestep_consumer.engine.planner.loading import OffloadedBackend


class Model:
    """Records its moves."""

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

    @property
    def songs(self) -> int | None:
        return None

    @property
    def waiting(self) -> int:
        return 0

    def add(self, sequence_id: int, generation: Generation) -> None:
        self.writing.append(sequence_id)

    def drop(self, sequence_id: int) -> None:
        self.writing.remove(sequence_id)

    def step(self) -> Sequence[SequenceOutput]:
        done, self.writing = self.writing, []
        return [SequenceOutput(sequence_id, 1, tokens=(0,)) for sequence_id in done]


def offloaded() -> tuple[OffloadedBackend, Model]:
    model = Model()
    return OffloadedBackend(model, torch.device("meta"), OneStep), model


def generation() -> Generation:
    return Generation(prompt=(1,), unconditional=None, constraint=CodeConstraint(1), sampling=Sampling(seed=1))


def test_the_model_is_in_ram_and_is_loaded_for_the_first_sequence_only() -> None:
    backend, model = offloaded()
    assert (model.places, backend.idle) == (["cpu"], True)
    backend.add(1, generation())
    backend.add(2, generation())
    assert (model.places, backend.idle) == (["cpu", "meta"], False)


def test_it_is_offloaded_after_the_last_sequence_and_loaded_for_the_next() -> None:
    backend, model = offloaded()
    backend.add(1, generation())
    assert [output.sequence_id for output in backend.step()] == [1]
    assert (model.places, backend.idle) == (["cpu", "meta", "cpu"], True)
    backend.add(2, generation())
    backend.drop(2)
    assert model.places == ["cpu", "meta", "cpu", "meta", "cpu"]
    assert backend.step() == ()
