# SPDX-License-Identifier: Apache-2.0
"""The page that Prometheus reads, read with Prometheus' own parser."""

import time
from dataclasses import dataclass

import pytest
from aiohttp import ClientSession
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from consumer.engine.usage import Usage
from consumer.health import Health
from consumer.metrics import Metrics, RendererCollector, WorkerCollector
from tests.support.vitals import vitals

GAUGES_OF_VITALS = {
    "acestep_gpu_idle_ratio",
    "acestep_vram_used_bytes",
    "acestep_vram_limit_bytes",
    "acestep_pack_songs",
    "acestep_pack_tokens",
}
COUNTERS = {"acestep_songs_total", "acestep_audio_seconds_total", "acestep_memory_squeezes_total"}


@dataclass
class Hands:
    in_hand: int = 3
    prefetch: int = 8


def metrics(usage: Usage, consumer: Hands | None) -> Metrics:
    return Metrics(WorkerCollector(lambda: consumer), RendererCollector(lambda: usage))


def samples(page: Metrics) -> dict[str, float]:
    body, _ = page.render("")
    return {sample.name: sample.value for family in parse(body.decode()) for sample in family.samples}


def half_idle() -> Usage:
    usage = Usage()
    now = time.monotonic()
    usage.process_ready(now - 40)
    usage.note(vitals(busy_s=20), now - 0.5)
    return usage


def test_a_page_shows_the_worker_and_its_device() -> None:
    found = samples(metrics(half_idle(), Hands()))
    assert found.pop("acestep_gpu_idle_ratio") == pytest.approx(0.5, abs=0.05)
    assert found == {
        "acestep_vram_used_bytes": 12.5 * 2**30,
        "acestep_vram_limit_bytes": 40 * 2**30,
        "acestep_pack_songs": 2,
        "acestep_pack_tokens": 750,
        "acestep_workers": 8,
        "acestep_in_hand": 3,
        "acestep_songs_total": 4,
        "acestep_audio_seconds_total": 120,
        "acestep_memory_squeezes_total": 1,
    }


def test_before_the_start_counters_are_zero_and_what_is_unknown_has_no_sample() -> None:
    assert samples(metrics(Usage(), None)) == {"acestep_workers": 0, "acestep_in_hand": 0} | dict.fromkeys(COUNTERS, 0)


def test_a_device_without_memory_of_its_own_shows_none() -> None:
    usage = Usage()
    usage.note(vitals(memory_gb=0, memory_limit_gb=0), time.monotonic() - 1)
    assert set(samples(metrics(usage, None))) >= {"acestep_pack_songs"}
    assert not {"acestep_vram_used_bytes", "acestep_vram_limit_bytes"} & set(samples(metrics(usage, None)))


def test_counters_do_not_fall_when_the_process_is_replaced() -> None:
    usage = half_idle()
    page = metrics(usage, Hands())
    before = samples(page)
    usage.process_gone()
    after = samples(page)
    assert {name: after[name] for name in COUNTERS} == {name: before[name] for name in COUNTERS}
    assert not GAUGES_OF_VITALS & set(after)


def test_every_family_has_a_type_and_a_help_that_is_a_sentence() -> None:
    body, _ = metrics(half_idle(), Hands()).render("")
    families = list(parse(body.decode()))
    assert len(families) == 10
    for family in families:
        assert family.type == ("counter" if f"{family.name}_total" in COUNTERS else "gauge")
        assert family.documentation.endswith(".")


def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    body, content_type = metrics(half_idle(), Hands()).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]  # the library leaves it so
    assert "acestep_songs" in {family.name for family in families}


def test_two_workers_in_one_process_do_not_meet() -> None:
    one, other = metrics(Usage(), Hands(prefetch=1)), metrics(Usage(), Hands(prefetch=2))
    assert (samples(one)["acestep_workers"], samples(other)["acestep_workers"]) == (1, 2)


async def test_the_page_is_served_next_to_the_health_pages() -> None:
    page = metrics(half_idle(), Hands())
    async with Health({}, page.render, "127.0.0.1", 0) as health, ClientSession() as client:
        async with client.get(f"http://127.0.0.1:{health.port}/metrics") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert "acestep_workers" in {family.name for family in parse(await answer.text())}
        async with client.get(f"http://127.0.0.1:{health.port}/healthz") as answer:
            assert answer.status == 200
