# SPDX-License-Identifier: Apache-2.0
"""Totals and idle share of an engine's stats."""

import pytest

from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.engine.messages import EngineStats
from tests.support.engine_stats import engine_stats


def note(usage: DeviceUsage, now_s: float, busy_s: float, **fields: float) -> None:
    usage.note(engine_stats(busy_s=busy_s, **fields), now_s)


def test_before_any_stats_everything_is_zero_or_unknown() -> None:
    usage = DeviceUsage()
    assert usage.stats is None
    assert (usage.audio_s, usage.reductions) == (0.0, 0)
    assert usage.idle_share(5.0) is None
    assert usage.memory_share is None


def test_totals_go_on_over_the_processes_of_an_engine() -> None:
    usage = DeviceUsage()
    note(usage, 1, 1, audio_s=90, reductions=1)
    note(usage, 2, 2, audio_s=150, reductions=2)
    usage.process_gone()
    assert usage.stats is None
    assert (usage.audio_s, usage.reductions) == (150, 2)
    usage.process_ready(10)
    note(usage, 11, 1, audio_s=30, reductions=0)
    assert (usage.audio_s, usage.reductions) == (180, 2)
    usage.process_gone()
    usage.process_gone()
    assert usage.audio_s == 180


def test_the_idle_share_is_that_of_the_last_minute_not_since_the_start() -> None:
    usage = DeviceUsage()
    usage.process_ready(0)
    for second in range(1, 601):  # ten minutes of work
        note(usage, second, second)
    assert usage.idle_share(600) == pytest.approx(0, abs=0.02)
    for second in range(601, 631):  # then half a minute of none
        note(usage, second, 600)
    assert usage.idle_share(630) == pytest.approx(0.5, abs=0.02)
    for second in range(631, 700):
        note(usage, second, 600)
    assert usage.idle_share(699) == 1


def test_silence_counts_as_idle() -> None:
    """An idle engine sends no stats."""
    usage = DeviceUsage()
    usage.process_ready(0)
    assert usage.idle_share(30) == 1
    for second in range(31, 61):
        note(usage, second, second - 30)
    assert usage.idle_share(60) == pytest.approx(0.5)
    assert usage.idle_share(90) == pytest.approx(0.5)
    assert usage.idle_share(300) == 1


def test_the_idle_share_stays_a_share_when_clocks_disagree() -> None:
    usage = DeviceUsage()
    usage.process_ready(0)
    note(usage, 1, 50)
    assert usage.idle_share(2) == 0
    note(usage, 3, 1)
    assert usage.idle_share(0) is None


def test_it_forgets_what_is_older_than_its_window() -> None:
    usage = DeviceUsage()
    for second in range(10_000):
        note(usage, second, second)
    assert len(usage._busy) <= 62


@pytest.mark.parametrize(("used", "limit", "share"), [(30, 40, 0.75), (30, 0, None), (0, 0, None)])
def test_the_memory_share_needs_a_limit(used: float, limit: float, share: float | None) -> None:
    usage = DeviceUsage()
    note(usage, 1, 1, memory_gb=used, memory_limit_gb=limit)
    assert usage.memory_share == share
    assert isinstance(usage.stats, EngineStats)
