# SPDX-License-Identifier: Apache-2.0
"""The renderer's request handler without a device: what a request leaves behind, and errors that nobody foresaw."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from acestep_consumer.config import logs
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Plan, Rendering, Sources
from acestep_consumer.engine.messages import Done, FromEngine, Render, RequestFailed, SetLogLevel, SetMemoryShare, Stop
from acestep_consumer.engine.renderer import service as module
from acestep_consumer.engine.renderer.service import RendererService
from acestep_schemas.events import ErrorCode, Metas
from tests.support.admission import admitted_job
from tests.support.waiting import eventually

SONGS = Rendering(tracks=(), render_s=0.0, encode_s=0.0)


class Scenario:
    """A service whose rendering is a function; it keeps what was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Callable[[Callable[[], bool]], Rendering]) -> None:
        self.sent: list[FromEngine] = []
        self.lost: list[BaseException] = []
        monkeypatch.setattr(module, "render", lambda _resources, _request, _report, stopped: work(stopped))
        monkeypatch.setattr(module, "STATS_INTERVAL_S", 3600.0)
        runtime: Any = SimpleNamespace(
            scheduler=None, settings=EngineSettings(), set_memory_share=self.set_memory_share
        )
        self.share_error: Exception | None = None
        self.service = RendererService(runtime, self.sent.append, cast("Any", self.on_lost), max_input_s=1)

    def set_memory_share(self, _memory_gb: float) -> None:
        if self.share_error is not None:
            raise self.share_error

    def on_lost(self, error: BaseException) -> NoReturn:
        self.lost.append(error)
        raise SystemExit

    def render(self, request_id: int) -> None:
        job, plan = admitted_job(prompt="sing"), Plan(metas=Metas())
        self.service.handle(
            Render(request_id=request_id, job=job, plan=plan, sources=Sources(), folder=Path("/nowhere"))
        )


async def test_a_stop_that_comes_after_the_answer_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario(monkeypatch, lambda _stopped: SONGS)
    for request_id in range(3):
        scenario.render(request_id)
    await eventually(lambda: not scenario.service._pending)
    for request_id in range(4):
        scenario.service.handle(Stop(request_id=request_id))
    kept = [value for value in vars(scenario.service).values() if isinstance(value, set | dict | list) and value]
    assert kept == []


async def test_a_stop_reaches_the_request_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    asked, go = threading.Semaphore(0), threading.Event()

    def work(stopped: Callable[[], bool]) -> Rendering:
        asked.release()
        assert go.wait(20)
        seen.append(stopped())
        return SONGS

    scenario = Scenario(monkeypatch, work)
    scenario.render(1)
    scenario.render(2)
    for _ in range(2):
        assert asked.acquire(timeout=20)
    scenario.service.handle(Stop(request_id=2))
    go.set()
    await eventually(lambda: len(scenario.sent) == 2)
    assert sorted(seen) == [False, True]


async def test_a_memory_share_that_cannot_be_set_replaces_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario(monkeypatch, lambda _stopped: SONGS)
    scenario.service.handle(SetMemoryShare(memory_gb=10))
    scenario.share_error = RuntimeError("the device does not answer")
    scenario.service.handle(SetMemoryShare(memory_gb=5))
    await eventually(lambda: scenario.lost)
    assert scenario.lost == [scenario.share_error]


async def test_a_request_is_answered_whatever_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_stopped: Callable[[], bool]) -> Rendering:
        raise RecursionError("nobody foresaw this")

    scenario = Scenario(monkeypatch, work)
    scenario.render(7)
    await eventually(lambda: scenario.sent)
    (answer,) = scenario.sent
    assert isinstance(answer, RequestFailed)
    assert (answer.request_id, answer.code) == (7, ErrorCode.RENDER_FAILED)
    assert not any(isinstance(message, Done) for message in scenario.sent)


def test_the_log_level_is_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, before = Scenario(monkeypatch, lambda _stopped: SONGS), logs._threshold.level
    try:
        scenario.service.handle(SetLogLevel(log_level="error"))
        assert logs._threshold.level == 40
    finally:
        logs._threshold.level = before
