# SPDX-License-Identifier: Apache-2.0
"""The page that Prometheus reads, read with Prometheus' own parser."""

import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import ClientSession
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from acestep_consumer.broker.errors import ConnectionLost, Nacked, Unroutable
from acestep_consumer.domain.objects import Traffic
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.observability.http import HealthServer
from acestep_consumer.observability.job_stats import JobStats, Refusals
from acestep_consumer.observability.metrics import (
    Metrics,
    engine_metrics,
    forwarding_metrics,
    process_metrics,
    readiness_metrics,
    renderer_metrics,
    scratch_metrics,
    startup_metrics,
    storage_metrics,
    worker_metrics,
)
from acestep_consumer.policy.tiers import BUILT_IN
from tests.support.engine_stats import engine_stats
from tests.support.jobs import make_job, make_manifest
from tests.support.metrics_page import families_of_a_worker, sample_names, samples_in, samples_of

PAGES = Path(__file__).parent / "pages"
GAUGES_OF_STATS = {
    "acestep_gpu_idle_ratio",
    "acestep_vram_used_bytes",
    "acestep_vram_limit_bytes",
    "acestep_pack_songs",
    "acestep_pack_tokens",
}
COUNTERS = {"acestep_memory_squeezes_total"}


@dataclass
class FakeConsumer:
    in_hand: int = 3
    prefetch: int = 8


def metrics(usage: DeviceUsage, consumer: FakeConsumer | None) -> Metrics:
    return Metrics(lambda: worker_metrics(consumer, 200), lambda: renderer_metrics(usage))


def samples(page: Metrics) -> dict[str, float]:
    return samples_in(page.render("")[0].decode())


def half_idle() -> DeviceUsage:
    usage = DeviceUsage()
    now = time.monotonic()
    usage.process_ready(now - 40)
    usage.note(engine_stats(busy_s=20), now - 0.5)
    return usage


def test_a_page_shows_the_worker_and_its_device() -> None:
    found = samples(metrics(half_idle(), FakeConsumer()))
    assert found.pop("acestep_gpu_idle_ratio") == pytest.approx(0.5, abs=0.05)
    assert found == {
        "acestep_vram_used_bytes": 12.5 * 2**30,
        "acestep_vram_limit_bytes": 40 * 2**30,
        "acestep_pack_songs": 2,
        "acestep_pack_tokens": 750,
        "acestep_workers": 8,
        "acestep_in_hand": 3,
        "acestep_queue_limit": 200,
        "acestep_memory_squeezes_total": 1,
    }


def test_before_the_start_counters_are_zero_and_what_is_unknown_has_no_sample() -> None:
    known = {"acestep_workers": 0, "acestep_in_hand": 0, "acestep_queue_limit": 200}
    assert samples(metrics(DeviceUsage(), None)) == known | dict.fromkeys(COUNTERS, 0)


def test_a_device_without_memory_of_its_own_shows_none() -> None:
    usage = DeviceUsage()
    usage.note(engine_stats(memory_gb=0, memory_limit_gb=0), time.monotonic() - 1)
    assert set(samples(metrics(usage, None))) >= {"acestep_pack_songs"}
    assert not {"acestep_vram_used_bytes", "acestep_vram_limit_bytes"} & set(samples(metrics(usage, None)))


def test_counters_do_not_fall_when_the_process_is_replaced() -> None:
    usage = half_idle()
    page = metrics(usage, FakeConsumer())
    before = samples(page)
    usage.process_gone()
    after = samples(page)
    assert {name: after[name] for name in COUNTERS} == {name: before[name] for name in COUNTERS}
    assert not GAUGES_OF_STATS & set(after)


async def test_every_family_of_a_worker_has_a_help_that_is_a_sentence_and_a_name_with_our_prefix() -> None:
    families = families_of_a_worker()
    assert len(families) >= 29
    for name, family in families.items():
        assert name.startswith(("acestep_", "process_"))
        assert family.type in ("counter", "gauge", "histogram")
        assert family.documentation.endswith(".")


async def test_no_label_of_a_worker_grows_with_its_work() -> None:
    """What may label a sample is one of these: each has as many values as the code, the tiers or the models."""
    labels = {key for family in families_of_a_worker().values() for sample in family.samples for key in sample.labels}
    worker = {"check", "state", "model", "tier", "code", "stage", "le", "reason", "engine", "phase"}
    assert labels <= worker | {"version", "python"}


async def test_a_worker_that_has_not_begun_shows_no_readiness_and_all_error_codes_at_zero() -> None:
    families = families_of_a_worker()
    ready = {sample.labels["check"]: sample.value for sample in families["acestep_ready"].samples}
    assert ready.keys() >= {"broker", "storage", "models"}
    assert set(ready.values()) == {0}
    assert {sample.value for sample in families["acestep_job_errors"].samples} == {0}
    assert {"acestep_jobs_total", "acestep_stage_seconds_bucket"} <= sample_names(families)


def test_jobs_become_counters_and_their_stages_histograms() -> None:
    stats, job = JobStats(), make_job()
    stats.job_ended(make_manifest(job), job)
    body, _ = Metrics(stats.collect).render("")
    families = {family.name: family for family in parse(body.decode())}
    (jobs,) = families["acestep_jobs"].samples
    assert (jobs.labels, jobs.value) == ({"state": "completed", "model": "acestep-v15-turbo", "tier": "tier1"}, 1)
    buckets = {
        sample.labels["le"]: sample.value
        for sample in families["acestep_stage_seconds"].samples
        if sample.labels["stage"] == "total" and sample.name.endswith("_bucket")
    }
    assert (buckets["0.25"], buckets["0.5"], buckets["1800.0"], buckets["+Inf"]) == (0, 1, 1, 1)


def test_storage_publishes_readiness_and_disk_have_their_page(tmp_path: Path) -> None:
    refusals, traffic = Refusals(), Traffic(sent_bytes=7, received_bytes=5, retries=2)
    for error in (Nacked(), Nacked(), Unroutable(), ConnectionLost()):
        refusals.add(error)
    found = samples_of(
        lambda: storage_metrics(traffic, away=True),
        refusals.collect,
        lambda: readiness_metrics({"storage": False}),
        lambda: scratch_metrics(tmp_path),
    )
    free, size = found.pop("acestep_scratch_free_bytes"), found.pop("acestep_scratch_size_bytes")
    assert 0 < free <= size
    assert found == {
        "acestep_s3_sent_bytes_total": 7,
        "acestep_s3_received_bytes_total": 5,
        "acestep_s3_retries_total": 2,
        "acestep_s3_away": 1,
        'acestep_publishes_refused_total{reason="nacked"}': 2,
        'acestep_publishes_refused_total{reason="unroutable"}': 1,
        'acestep_ready{check="storage"}': 0,
    }


def test_forwarded_requests_are_counted_by_tier_and_without_tier_routing_there_are_none() -> None:
    assert samples_of(lambda: forwarding_metrics({"tier6": 0, "unlimited": 3})) == {
        'acestep_requests_sent_on_total{tier="tier6"}': 0,
        'acestep_requests_sent_on_total{tier="unlimited"}': 3,
    }
    assert samples_of(lambda: forwarding_metrics({})) == {}


async def test_a_worker_counts_what_it_sends_on_from_zero_for_each_larger_tier_and_only_with_the_setting() -> None:
    def tiers(**variables: str) -> dict[str, float]:
        family = families_of_a_worker(**variables)["acestep_requests_sent_on"]
        return {sample.labels["tier"]: sample.value for sample in family.samples}

    assert tiers() == {}
    larger = [tier.name for tier in BUILT_IN.tiers[1:]]
    assert tiers(ACESTEP_ROUTE_BY_TIER="true") == dict.fromkeys(larger, 0)


def test_a_folder_that_is_not_there_has_no_disk(tmp_path: Path) -> None:
    assert samples_of(lambda: scratch_metrics(tmp_path / "none")) == {}


def test_the_page_says_which_version_runs_and_what_its_process_takes() -> None:
    found = samples_of(process_metrics)
    (build,) = (name for name in found if name.startswith("acestep_build_info"))
    assert f'python="{platform.python_version()}"' in build
    assert re.search(r'version="[^"]+"', build)
    assert found[build] == 1
    assert found["process_resident_memory_bytes"] > 0
    assert found["process_cpu_seconds_total"] > 0
    assert 0 < found["process_open_fds"] <= found["process_max_fds"]


def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    stats, job = JobStats(), make_job()
    stats.job_ended(make_manifest(job), job)
    body, content_type = Metrics(stats.collect).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]  # the library leaves it so
    assert {"acestep_jobs", "acestep_stage_seconds"} <= families


def test_two_workers_in_one_process_do_not_meet() -> None:
    one, other = metrics(DeviceUsage(), FakeConsumer(prefetch=1)), metrics(DeviceUsage(), FakeConsumer(prefetch=2))
    assert (samples(one)["acestep_workers"], samples(other)["acestep_workers"]) == (1, 2)


async def test_the_page_is_served_next_to_the_health_pages() -> None:
    page = metrics(half_idle(), FakeConsumer())
    async with HealthServer({}, page.render, "127.0.0.1", 0) as health, ClientSession() as client:
        async with client.get(f"http://127.0.0.1:{health.port}/metrics") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert "acestep_workers" in {family.name for family in parse(await answer.text())}
        async with client.get(f"http://127.0.0.1:{health.port}/healthz") as answer:
            assert answer.status == 200


def test_restarts_are_counted_for_each_engine() -> None:
    assert samples_of(lambda: engine_metrics({"renderer": 2, "planner": 0})) == {
        'acestep_engine_restarts_total{engine="renderer"}': 2,
        'acestep_engine_restarts_total{engine="planner"}': 0,
    }


def test_the_seconds_of_a_start_are_told_by_engine_and_phase() -> None:
    assert samples_of(lambda: startup_metrics({"renderer": {"imports": 4.5, "models": 2.0}, "planner": {}})) == {
        'acestep_startup_seconds{engine="renderer",phase="imports"}': 4.5,
        'acestep_startup_seconds{engine="renderer",phase="models"}': 2.0,
    }


async def test_the_families_of_a_worker_are_those_of_the_first_release_and_what_was_added() -> None:
    """Names, types and labels are what dashboards and alerts rest on."""
    before = {family.name: family for family in parse((PAGES / "worker.prom").read_text())}
    now = families_of_a_worker(ACESTEP_ROUTE_BY_TIER="true")
    stages = {"acestep_stage_jobs", "acestep_stage_waiting", "acestep_stage_limit"}
    added = (
        {name for name in now if name.startswith("process_")}
        | {"acestep_build_info", "acestep_startup_seconds"}
        | stages
    )
    assert now.keys() - before.keys() == added
    assert [now[name].type for name in before] == [family.type for family in before.values()]
    added_samples = {sample for name in before for sample in shape(now[name]) - shape(before[name])}
    assert not {sample for name in before for sample in shape(before[name]) - shape(now[name])}
    # Histograms may have more buckets: the bounds that a query may name are still there.
    assert {name for name, _ in added_samples} == {"acestep_stage_seconds_bucket"}


def shape(family: Metric) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Names and labels of a family's samples."""
    return {(each.name, tuple(sorted(each.labels.items()))) for each in family.samples}
