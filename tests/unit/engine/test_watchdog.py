# SPDX-License-Identifier: Apache-2.0
"""Faults for which an engine process is replaced, and conditions that are none."""

import asyncio

import pytest

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.job import Rendering
from acestep_consumer.engine.engines import watchdog_limits_of
from acestep_consumer.engine.messages import (
    Alive,
    Done,
    FromEngine,
    Loading,
    Progressed,
    Ready,
    RequestFailed,
    SetMemoryShare,
)
from acestep_consumer.engine.pending_requests import PendingRequests
from acestep_consumer.engine.watchdog import SILENCE_S, Watchdog, WatchdogLimits
from acestep_schemas.events import ErrorCode
from tests.support.engine_double import REPORT
from tests.support.engine_stats import engine_stats

LIMITS = WatchdogLimits(hang_s=10, stop_s=3, start_s=100, ram_bytes=3 << 30, ram_source="the test says so")
SIGNS: list[FromEngine] = [
    Progressed(request_id=1, fraction=0.1, stage="render"),
    Done(request_id=1, result=Rendering(tracks=(), render_s=0, encode_s=0)),
    RequestFailed(request_id=1, code=ErrorCode.RENDER_FAILED, reason="it broke"),
    engine_stats(songs_done=1),
]


def silent(*_: object) -> None:
    """Ignore progress."""


@pytest.fixture
async def requests() -> PendingRequests:
    return PendingRequests()


@pytest.fixture
def watchdog() -> Watchdog:
    """Over a process that started at 0 and was ready at 5."""
    watchdog = Watchdog(LIMITS, 0)
    watchdog.observe(Ready(report=REPORT), 5)
    return watchdog


async def test_a_process_without_requests_may_be_silent_for_ever(watchdog: Watchdog, requests: PendingRequests) -> None:
    assert watchdog.fault(requests, 0, 1e6) is None


async def test_the_time_of_a_hang_starts_with_the_first_request(watchdog: Watchdog, requests: PendingRequests) -> None:
    requests.add(silent, 1000)
    assert watchdog.fault(requests, 0, 1010) is None
    # Whoever comes later changes nothing: a busy queue must not hide a hang.
    requests.add(silent, 1009)
    fault = watchdog.fault(requests, 0, 1010.1)
    assert fault is not None
    assert "10 s (ACESTEP_ENGINE_HANG_S)" in fault


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.kind)
async def test_a_sign_of_progress_resets_the_time(
    watchdog: Watchdog, requests: PendingRequests, sign: FromEngine
) -> None:
    requests.add(silent, 5)
    watchdog.observe(sign, 14)
    assert watchdog.fault(requests, 0, 23) is None
    assert watchdog.fault(requests, 0, 25) is not None


async def test_stats_without_another_song_are_no_progress(watchdog: Watchdog, requests: PendingRequests) -> None:
    requests.add(silent, 5)
    watchdog.observe(engine_stats(songs_done=4), 6)
    for now in range(7, 16):
        watchdog.observe(engine_stats(songs_done=4), now)
    assert watchdog.fault(requests, 0, 16.1) is not None


async def test_a_stopped_request_must_be_answered_soon_whatever_else_goes_on(
    watchdog: Watchdog, requests: PendingRequests
) -> None:
    request_id, answer = requests.add(silent, 5)
    requests.add(silent, 5)
    answer.cancel()
    assert requests.stop(request_id, 6)
    watchdog.observe(SIGNS[0], 9)
    assert watchdog.fault(requests, 0, 9) is None
    fault = watchdog.fault(requests, 0, 9.1)
    assert fault is not None
    assert "stopped" in fault
    requests.answer(request_id, None)
    assert watchdog.fault(requests, 0, 9.1) is None


async def test_a_process_may_load_for_long_but_not_without_progress(requests: PendingRequests) -> None:
    watchdog = Watchdog(LIMITS, 0)
    watchdog.observe(Loading(step="weights", phase="models"), 90)
    assert watchdog.fault(requests, 0, 190) is None
    assert "no progress while loading for 100 s" in str(watchdog.fault(requests, 0, 190.1))


async def test_a_process_that_is_silent_while_loading_is_paused_or_hangs(requests: PendingRequests) -> None:
    """Long before it had to make progress."""
    watchdog = Watchdog(WatchdogLimits(start_s=1800, silence_s=300), 0)
    for now in range(0, 601, 5):
        watchdog.observe(Alive(), now)
        assert watchdog.fault(requests, 0, now) is None
    assert watchdog.fault(requests, 0, 900) is None
    assert "paused or hung: no message for 300 s" in str(watchdog.fault(requests, 0, 900.1))


async def test_a_process_may_wait_for_the_other_engine_as_long_as_it_sends_heartbeats(
    requests: PendingRequests,
) -> None:
    watchdog = Watchdog(LIMITS, 0)
    watchdog.observe(Loading(step="waiting for the renderer", phase="waiting"), 1)
    for now in range(5, 1000, 5):
        watchdog.observe(Alive(), now)
    assert watchdog.fault(requests, 0, 1000) is None
    watchdog.observe(Loading(step="weights", phase="models"), 1000)
    watchdog.observe(Alive(), 1100)
    assert "no progress while loading for 100 s" in str(watchdog.fault(requests, 0, 1100.1))


async def test_heartbeats_are_no_progress(requests: PendingRequests) -> None:
    watchdog = Watchdog(LIMITS, 0)
    for now in range(0, 101, 5):
        watchdog.observe(Alive(), now)
    assert "no progress while loading for 100 s" in str(watchdog.fault(requests, 0, 100.1))


def test_the_hang_limit_of_the_settings_counts_while_loading_too() -> None:
    limits = [watchdog_limits_of(EngineSettings(hang_s=seconds)) for seconds in (300, 20)]
    # A process needs some time until its first heartbeat.
    assert [(each.hang_s, each.silence_s) for each in limits] == [(300, 300), (20, SILENCE_S)]


async def test_memory_beyond_the_limit_is_reported_with_the_figures_and_the_setting(
    watchdog: Watchdog, requests: PendingRequests
) -> None:
    assert watchdog.fault(requests, 3 << 30, 6) is None
    assert (
        watchdog.fault(requests, 7 << 29, 6) == "it held 3.50 GB of RAM, above the limit of 3.00 GB (the test says so)"
    )


async def test_memory_that_is_not_known_or_not_bounded_is_no_fault(
    watchdog: Watchdog, requests: PendingRequests
) -> None:
    assert watchdog.fault(requests, None, 6) is None
    assert Watchdog(WatchdogLimits(), 0).fault(requests, 1 << 60, 6) is None


async def test_requests_are_answered_once_and_all_are_answered_when_the_process_dies() -> None:
    requests, progress = PendingRequests(), []
    first, answer = requests.add(lambda *update: progress.append(update), 0)
    second, lost = requests.add(silent, 0)
    requests.report(first, 0.5, "render")
    requests.answer(first, "song")
    requests.answer(first, "again")
    requests.report(first, 0.9, "render")
    assert not requests.stop(first, 1)
    requests.answer_all(lambda: "gone")
    assert (await answer, await lost, progress) == ("song", "gone", [(0.5, "render")])
    assert (len(requests), second) == (0, first + 1)


async def test_waiting_for_an_empty_process_includes_stopped_requests() -> None:
    requests = PendingRequests()
    request_id, answer = requests.add(silent, 0)
    answer.cancel()
    requests.stop(request_id, 1)
    waiting = asyncio.create_task(requests.wait_empty())
    await asyncio.sleep(0)
    assert not waiting.done()
    requests.answer(request_id, None)
    async with asyncio.timeout(1):
        await waiting


def test_a_message_of_the_other_direction_is_no_sign(watchdog: Watchdog) -> None:
    before = watchdog._progress_s
    watchdog.observe(SetMemoryShare(memory_gb=1), 50)  # type: ignore[arg-type]  # a process that is confused
    assert watchdog._progress_s == before
