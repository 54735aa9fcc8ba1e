# SPDX-License-Identifier: Apache-2.0
"""What makes an engine process one to be replaced, and what does not."""

import asyncio

import pytest

from acestep_consumer.domain.job import Rendering
from acestep_consumer.engine.messages import Done, FromEngine, Loading, Progressed, Ready, RequestFailed, SetMemoryShare
from acestep_consumer.engine.pending_requests import PendingRequests
from acestep_consumer.engine.watchdog import Watchdog, WatchdogLimits
from acestep_schemas.events import ErrorCode
from tests.support.engine_double import REPORT
from tests.support.vitals import vitals

BOUNDS = WatchdogLimits(hang_s=10, stop_s=3, start_s=100, ram_bytes=3 << 30, ram_why="the test says so")
SIGNS: list[FromEngine] = [
    Progressed(order=1, fraction=0.1, stage="render"),
    Done(order=1, result=Rendering(tracks=(), render_s=0, encode_s=0)),
    RequestFailed(order=1, code=ErrorCode.RENDER_FAILED, reason="it broke"),
    vitals(songs_done=1),
]


def silent(*_: object) -> None:
    """Hear no progress."""


@pytest.fixture
async def orders() -> PendingRequests:
    return PendingRequests()


@pytest.fixture
def watch() -> Watchdog:
    """Over a process that started at 0 and was ready at 5."""
    watch = Watchdog(BOUNDS, 0)
    watch.hear(Ready(report=REPORT), 5)
    return watch


async def test_a_process_without_orders_may_be_silent_for_ever(watch: Watchdog, orders: PendingRequests) -> None:
    assert watch.fault(orders, 0, 1e6) is None


async def test_the_clock_of_a_hang_starts_with_the_first_order(watch: Watchdog, orders: PendingRequests) -> None:
    orders.add(silent, 1000)
    assert watch.fault(orders, 0, 1010) is None
    # Whoever comes later changes nothing: a busy queue must not hide a hang.
    orders.add(silent, 1009)
    fault = watch.fault(orders, 0, 1010.1)
    assert fault is not None
    assert "10 s (ACESTEP_ENGINE_HANG_S)" in fault


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.kind)
async def test_a_sign_of_progress_starts_the_clock_anew(
    watch: Watchdog, orders: PendingRequests, sign: FromEngine
) -> None:
    orders.add(silent, 5)
    watch.hear(sign, 14)
    assert watch.fault(orders, 0, 23) is None
    assert watch.fault(orders, 0, 25) is not None


async def test_vitals_without_a_song_more_are_no_progress(watch: Watchdog, orders: PendingRequests) -> None:
    orders.add(silent, 5)
    watch.hear(vitals(songs_done=4), 6)
    for now in range(7, 16):
        watch.hear(vitals(songs_done=4), now)
    assert watch.fault(orders, 0, 16.1) is not None


async def test_an_order_that_was_stopped_must_be_answered_soon_whatever_else_goes_on(
    watch: Watchdog, orders: PendingRequests
) -> None:
    number, answer = orders.add(silent, 5)
    orders.add(silent, 5)
    answer.cancel()
    assert orders.stop(number, 6)
    watch.hear(SIGNS[0], 9)
    assert watch.fault(orders, 0, 9) is None
    fault = watch.fault(orders, 0, 9.1)
    assert fault is not None
    assert "stopped" in fault
    orders.answer(number, None)
    assert watch.fault(orders, 0, 9.1) is None


async def test_a_process_may_load_for_long_but_not_without_progress(orders: PendingRequests) -> None:
    watch = Watchdog(BOUNDS, 0)
    watch.hear(Loading(what="weights"), 90)
    assert watch.fault(orders, 0, 190) is None
    assert "loaded for 100 s without progress" in str(watch.fault(orders, 0, 190.1))


async def test_memory_beyond_the_limit_is_told_with_the_figures_and_the_setting(
    watch: Watchdog, orders: PendingRequests
) -> None:
    assert watch.fault(orders, 3 << 30, 6) is None
    assert watch.fault(orders, 7 << 29, 6) == "it holds 3.50 GB of RAM, more than 3.00 GB (the test says so)"


async def test_memory_that_is_not_known_or_not_bounded_is_no_fault(watch: Watchdog, orders: PendingRequests) -> None:
    assert watch.fault(orders, None, 6) is None
    assert Watchdog(WatchdogLimits(), 0).fault(orders, 1 << 60, 6) is None


async def test_orders_are_answered_once_and_all_are_told_of_a_loss() -> None:
    orders, heard = PendingRequests(), []
    first, answer = orders.add(lambda *news: heard.append(news), 0)
    second, lost = orders.add(silent, 0)
    orders.report(first, 0.5, "render")
    orders.answer(first, "song")
    orders.answer(first, "again")
    orders.report(first, 0.9, "render")
    assert not orders.stop(first, 1)
    orders.lose(lambda: "gone")
    assert (await answer, await lost, heard) == ("song", "gone", [(0.5, "render")])
    assert (len(orders), second) == (0, first + 1)


async def test_who_waits_for_an_empty_process_also_waits_for_what_was_stopped() -> None:
    orders = PendingRequests()
    number, answer = orders.add(silent, 0)
    answer.cancel()
    orders.stop(number, 1)
    waiting = asyncio.create_task(orders.wait_none())
    await asyncio.sleep(0)
    assert not waiting.done()
    orders.answer(number, None)
    async with asyncio.timeout(1):
        await waiting


def test_a_message_of_the_other_direction_is_no_sign(watch: Watchdog) -> None:
    before = watch._progress_s
    watch.hear(SetMemoryShare(memory_gb=1), 50)  # type: ignore[arg-type]  # a process that is confused
    assert watch._progress_s == before
