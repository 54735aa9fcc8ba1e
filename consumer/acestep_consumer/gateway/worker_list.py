# SPDX-License-Identifier: Apache-2.0
"""The workers that were heard of lately, and the models that they serve."""

import time
from collections.abc import Iterable
from typing import Final

from acestep_consumer.domain.tasks import Variant, tasks_of
from acestep_schemas.events import Worker

FORGOTTEN_S: Final = 90.0
"""A worker without an announcement for this time is gone: each is asked several times in it."""


class WorkerList:
    """Workers by id, from their announcements.

    Args:
        assumed: models to name while no worker is known, where workers are started on demand.
    """

    def __init__(self, assumed: Iterable[str] = ()) -> None:
        self._assumed = tuple(assumed)
        self._workers: dict[str, tuple[Worker, float]] = {}

    def add(self, worker: Worker) -> None:
        """Take an announcement into account."""
        if worker.state == "stopped":
            self._workers.pop(worker.worker_id, None)
        else:
            self._workers[worker.worker_id] = worker, time.monotonic()

    def present(self) -> tuple[Worker, ...]:
        """Return the workers that take requests."""
        oldest = time.monotonic() - FORGOTTEN_S
        self._workers = {name: entry for name, entry in self._workers.items() if entry[1] >= oldest}
        return tuple(worker for worker, _ in self._workers.values() if worker.state == "ready")

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are served, a worker's primary one first."""
        served = dict.fromkeys(model for worker in self.present() for model in worker.models)
        return tuple(served) or self._assumed

    @property
    def language_models(self) -> tuple[str, ...]:
        """The language models that are loaded."""
        return tuple(dict.fromkeys(worker.lm.model for worker in self.present() if worker.lm is not None))

    @property
    def lacks_language_model(self) -> bool:
        """Whether there are workers, and none of them has a language model."""
        return bool(self.present()) and not self.language_models

    @property
    def running(self) -> int:
        """Jobs that the workers said they run."""
        return sum(worker.in_hand for worker in self.present())


def task_types_of(model: str) -> tuple[str, ...]:
    """Return the task types of a model, by its name as ACE-Step's server does."""
    name = model.lower()
    if "turbo" in name:
        return tasks_of(Variant.TURBO)
    return tasks_of(Variant.BASE if "base" in name or "sft" not in name else Variant.SFT)
