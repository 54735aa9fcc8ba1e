# SPDX-License-Identifier: Apache-2.0
"""Places of waiting jobs and the time until their songs, and what the workers announced. Pure."""

import math
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Final

from pydantic import BaseModel, ConfigDict

from acestep_consumer.client.estimate import WorkerLoad, expected
from acestep_schemas.events import Worker

FORGET_AFTER: Final = timedelta(seconds=120)
"""Workers are asked to announce themselves every 20 s: one that is silent for so long is gone."""


class Place(BaseModel):
    """A waiting job's place, 1 being next, and whole seconds until its songs are there; None: not known."""

    model_config = ConfigDict(frozen=True)

    place: int
    expected_s: int | None


class WorkersView(BaseModel):
    """The workers that announced themselves. ``lm``: any has a language model loaded; None: no worker is known."""

    model_config = ConfigDict(frozen=True)

    lm: bool | None = None
    models: tuple[str, ...] = ()


class WaitingPlaces:
    """Places in the queue of the jobs that were submitted from the page.

    AMQP does not tell a message's place. It is the queue's length when the job came to it, less the jobs that have left
    the queue since, and never more than its length: priorities and cancellations of others make it an estimate.
    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def add(self, task_id: str, place: int) -> None:
        """Add a job that has come to the queue."""
        self._places[task_id] = place

    def remove(self, task_id: str) -> None:
        """Remove a job that waits no more."""
        self._places.pop(task_id, None)

    def advance(self, task_id: str, *, begun: bool) -> None:
        """Move jobs up, after an event of a job: its first one says that it has left the queue. ``begun``: it had."""
        if begun:
            return
        own = self._places.pop(task_id, 0)
        for other, place in self._places.items():
            if place > max(own, 1):
                self._places[other] = place - 1

    def limit(self, waiting: int | None) -> None:
        """Correct places by the queue's length."""
        if waiting:
            for task_id, place in self._places.items():
                self._places[task_id] = min(place, waiting)

    def shown(self, loads: Collection[WorkerLoad], job_s: float | None) -> dict[str, Place]:
        """Return each place with its expected seconds. ``loads``, ``job_s``: as in ``client.estimate.expected``."""
        known: dict[int, int | None] = {}
        for place in set(self._places.values()):
            seconds = expected(place, loads, job_s)
            known[place] = None if seconds is None else math.ceil(seconds)
        return {task_id: Place(place=place, expected_s=known[place]) for task_id, place in self._places.items()}


class WorkerRegister:
    """The latest announcement of each worker. ``clock`` returns the time."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._workers: dict[str, tuple[Worker, datetime]] = {}

    def add(self, worker: Worker) -> bool:
        """Take an announcement; returns whether the summary changed."""
        before = self.summary()
        self._workers.pop(worker.worker_id, None)
        if worker.state != "stopped":
            self._workers[worker.worker_id] = (worker, self._clock())
        oldest = self._clock() - FORGET_AFTER
        self._workers = {name: entry for name, entry in self._workers.items() if entry[1] > oldest}
        return self.summary() != before

    def loads(self) -> list[WorkerLoad]:
        """Return how busy the workers are that take requests."""
        known = (worker for worker, _ in self._workers.values())
        return [WorkerLoad.of(worker) for worker in known if worker.state == "ready" and worker.prefetch > 0]

    def summary(self) -> WorkersView:
        """Return what the page shows of them."""
        known = [worker for worker, _ in self._workers.values()]
        if not known:
            return WorkersView()
        models = {model: None for worker in known for model in worker.models}
        return WorkersView(lm=any(worker.lm is not None for worker in known), models=tuple(models))
