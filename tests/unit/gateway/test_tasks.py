# SPDX-License-Identifier: Apache-2.0
"""States of tasks: memory that stays small, and storage that is asked rarely."""

import asyncio

import pytest

from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.gateway import tasks as module
from acestep_consumer.gateway.result_folder import ResultFolder
from acestep_consumer.gateway.task_ids import new_task_id
from acestep_consumer.gateway.tasks import TaskStates
from tests.support.gateway import FakeResults, completed, progress, settings_of, started
from tests.support.waiting import eventually

FOLDER = ResultFolder(settings_of().storage)


async def test_memory_stays_flat_and_forgotten_tasks_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_ENDED", 10)
    monkeypatch.setattr(module, "KEPT_OPEN", 20)
    results = FakeResults()
    states = TaskStates(results, FOLDER)
    for number in range(100):
        event = results.ends[f"t{number}"] = completed(f"t{number}")
        states.add(event)
        states.accept(f"waiting-{number}")
    assert (len(states._ended), len(states._open)) == (10, 20)
    view = await states.find("t0")
    assert view is not None
    assert view.stage == "succeeded"
    assert results.reads == 1
    assert states.counts["succeeded"] == 100


async def test_an_ended_task_stays_ended_whatever_comes_late() -> None:
    states = TaskStates(FakeResults(), FOLDER)
    states.add(completed("a"))
    for event in (started("a"), progress("a")):
        states.add(event)
    view = await states.find("a")
    assert view is not None
    assert view.stage == "succeeded"


async def test_a_task_without_news_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    results = FakeResults()
    states = TaskStates(results, FOLDER)
    task_id = new_task_id()
    states.accept(task_id)
    results.ends[task_id] = completed(task_id)
    assert (await states.find(task_id)).stage == "queued"  # type: ignore[union-attr]
    monkeypatch.setattr(module, "NEWS_S", 0.0)
    assert (await states.find(task_id)).stage == "queued"  # type: ignore[union-attr]
    await eventually(lambda: task_id in states._ended)
    assert (await states.find(task_id)).stage == "succeeded"  # type: ignore[union-attr]


async def test_storage_that_is_away_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Away(FakeResults):
        async def find(self, task_id: str) -> None:
            self.reads += 1
            if self.reads == 1:
                raise DownloadFailed("away")
            await asyncio.sleep(60)

    monkeypatch.setattr(module, "LOOKUP_S", 0.01)
    results = _Away()
    states = TaskStates(results, FOLDER)
    task_id = new_task_id()
    assert (await states.find(task_id)).stage == "queued"  # type: ignore[union-attr]
    assert await states.find("another") is None
    assert await states.find("another") is None
    assert results.reads == 2


async def test_a_task_that_was_refused_is_forgotten_unless_it_runs() -> None:
    states = TaskStates(FakeResults(), FOLDER)
    states.accept("a")
    states.forget("a")
    assert states.known("a") is None
    states.accept("b")
    states.add(started("b"))
    states.forget("b")
    assert states.known("b") is not None
