# SPDX-License-Identifier: Apache-2.0
"""What ``top`` reads from a worker's page of metrics, made by the worker's own code."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from acestep_consumer.commands.top.report import (
    MetricsHistory,
    MetricsPage,
    MetricsUnreadable,
    TopReport,
    read_page,
    top_of,
)
from acestep_consumer.commands.top.run import NoWorker, address_of, completed
from acestep_consumer.commands.top.table import table
from acestep_consumer.config.settings import WorkerSettings
from acestep_consumer.domain.job import StoredObject
from acestep_consumer.domain.objects import Traffic
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.observability.job_stats import JobStats
from acestep_consumer.observability.metrics import Metrics, engine_metrics, renderer_metrics, storage_metrics
from tests.support.engine_stats import engine_stats
from tests.support.jobs import make_job, make_manifest, make_track
from tests.support.metrics_page import families_of_a_worker

URL = "http://127.0.0.1:8080"
READY = {"status": "ready", "checks": {"broker": True, "models": True}}
SMALL = """\
# TYPE acestep_in_hand gauge
acestep_in_hand 3
# TYPE acestep_workers gauge
acestep_workers 4
# TYPE acestep_jobs_total counter
acestep_jobs_total{state="completed",model="a",tier="t"} 5
acestep_jobs_total{state="completed",model="b",tier="t"} 2
acestep_jobs_total{state="failed",model="a",tier="t"} 1
# TYPE acestep_stage_jobs gauge
acestep_stage_jobs{stage="plan"} 2
acestep_stage_jobs{stage="render"} 3
# TYPE acestep_stage_waiting gauge
acestep_stage_waiting{stage="plan"} 0
acestep_stage_waiting{stage="render"} 1
# TYPE acestep_stage_limit gauge
acestep_stage_limit{stage="render"} 2
# TYPE acestep_stage_seconds histogram
acestep_stage_seconds_bucket{stage="render",le="+Inf"} 4
acestep_stage_seconds_sum{stage="render"} 10
acestep_stage_seconds_count{stage="render"} 4
acestep_stage_seconds_bucket{stage="plan",le="+Inf"} 0
acestep_stage_seconds_sum{stage="plan"} 0
acestep_stage_seconds_count{stage="plan"} 0
"""


def counted(songs: int, now_s: float) -> MetricsPage:
    return read_page(f"# TYPE acestep_songs_total counter\nacestep_songs_total {songs}\n", now_s)


def top_after(*pages: MetricsPage) -> TopReport:
    recorder = MetricsHistory()
    for page in pages:
        recorder.add(page)
    return top_of(URL, pages[-1], recorder, READY)


def shown(top: TopReport) -> str:
    text = io.StringIO()
    Console(file=text, width=200, highlight=False).print(table(top))
    return text.getvalue()


def test_the_families_of_a_real_worker_are_the_ones_that_are_read(tmp_path: Path) -> None:
    usage = DeviceUsage()
    usage.process_ready(time.monotonic() - 40)
    usage.note(engine_stats(memory_gb=10, memory_limit_gb=20, songs_in_pack=3), time.monotonic())
    traffic = Traffic()
    traffic.sent_bytes = 5_000_000
    jobs, job = JobStats(), make_job()
    song = StoredObject(track=make_track(tmp_path / "0.wav"), uri="s3://b/t/0.wav", url=None, bytes=4, sha256="0" * 64)
    jobs.job_ended(make_manifest(job, (song,) * 7), job)
    page = Metrics(
        jobs.collect,
        lambda: renderer_metrics(usage),
        lambda: engine_metrics({"renderer": 2, "planner": 0}),
        lambda: storage_metrics(traffic, away=False),
    ).render("text/plain")[0]
    found = top_after(read_page(page.decode(), 0))
    assert (found.songs.total, found.device.pack_songs, found.device.vram_limit) == (7, 3, 20 * 2**30)
    assert found.restarts == {"renderer": 2, "planner": 0}
    assert (found.storage.sent, found.storage.away) == (5_000_000, False)
    assert found.device.busy is not None


async def test_every_family_that_is_asked_for_exists_on_the_page_of_a_worker() -> None:
    """A renamed family would only show as a dash, for ever."""
    there = families_of_a_worker()
    asked = {
        "acestep_in_hand",
        "acestep_workers",
        "acestep_jobs",
        "acestep_stage_jobs",
        "acestep_stage_waiting",
        "acestep_stage_limit",
        "acestep_stage_seconds",
        "acestep_songs",
        "acestep_audio_seconds",
        "acestep_gpu_idle_ratio",
        "acestep_vram_used_bytes",
        "acestep_vram_limit_bytes",
        "acestep_pack_songs",
        "acestep_pack_tokens",
        "acestep_memory_squeezes",
        "acestep_engine_restarts",
        "acestep_s3_sent_bytes",
        "acestep_s3_received_bytes",
        "acestep_s3_retries",
        "acestep_s3_away",
    }
    assert asked <= set(there)


def test_labels_are_summed_and_histograms_are_means() -> None:
    found = top_after(read_page(SMALL, 0))
    assert (found.jobs.in_hand, found.jobs.workers) == (3, 4)
    assert found.jobs.ended == {"completed": 7, "failed": 1}
    assert found.jobs.stages == {"plan": 2, "render": 3}
    assert (found.jobs.stages_waiting["render"], found.jobs.stage_limits) == (1, {"render": 2})
    assert found.stages_s == {"render": 2.5}


def test_families_that_a_worker_does_not_have_are_unknown_and_no_error() -> None:
    found = top_after(read_page(SMALL, 0))
    assert (found.songs.total, found.device.busy, found.storage.sent, found.restarts) == (None, None, None, {})
    text = shown(found)
    assert "3 of 4" in text
    assert "plan 2, render 2 of 2 (+1 waiting)" in text
    assert "completed 7, failed 1" in text
    assert "– of –" in text


def test_rates_are_counted_over_the_last_minute() -> None:
    found = top_after(*(counted(10 * minute, 60 * minute) for minute in range(5)))
    assert (found.songs.a_minute, found.window_s, found.songs.total) == (10, 60, 40)


def test_one_page_has_no_rates() -> None:
    found = top_after(counted(10, 0))
    assert (found.songs.a_minute, found.window_s) == (None, 0)


def test_a_worker_that_was_restarted_counts_from_nothing_again() -> None:
    found = top_after(counted(100, 0), counted(110, 10), counted(0, 20), counted(1, 30))
    assert (found.songs.a_minute, found.window_s) == (6, 10)


@pytest.mark.parametrize("text", ["<html>not found</html>", "", "# TYPE other gauge\nother 1\n"])
def test_a_page_of_somebody_else_is_refused(text: str) -> None:
    with pytest.raises(MetricsUnreadable):
        read_page(text, 0)


def test_a_worker_that_is_not_ready_says_why() -> None:
    page = counted(1, 0)
    recorder = MetricsHistory()
    recorder.add(page)
    found = top_of(URL, page, recorder, {"status": "not ready", "checks": {"broker": False, "models": True}})
    assert "not ready (broker)" in shown(found)
    assert top_of(URL, page, recorder, {}).status == "unknown"


def test_storage_that_is_away_is_told_loudly() -> None:
    page = read_page("# TYPE acestep_s3_away gauge\nacestep_s3_away 1\n", 0)
    assert "UNREACHABLE, jobs wait" in shown(top_after(page))


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("127.0.0.1", 8080, URL),
        ("0.0.0.0", 9000, "http://127.0.0.1:9000"),  # noqa: S104 - as a setting
        ("::", 9000, "http://[::1]:9000"),
        ("fd00::1", 9000, "http://[fd00::1]:9000"),
        ("worker-1", 80, "http://worker-1:80"),
    ],
)
def test_the_settings_say_where_the_worker_listens(host: str, port: int, url: str) -> None:
    assert address_of(WorkerSettings(http_host=host, http_port=port)) == url


def test_a_free_port_cannot_be_known() -> None:
    with pytest.raises(NoWorker, match="--url"):
        address_of(WorkerSettings(http_port=0))


def test_an_address_without_a_scheme_will_do() -> None:
    assert completed("host:9000") == "http://host:9000"
    assert completed("https://host") == "https://host"
