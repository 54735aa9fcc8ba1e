# SPDX-License-Identifier: Apache-2.0
"""Statistics of finished jobs: each is counted once, under names that cannot grow, at a cost that nobody notices."""

import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest

from acestep_consumer.broker.errors import ConnectionLost, Nacked, Unroutable
from acestep_consumer.domain.job import Job, StoredObject
from acestep_consumer.observability.job_stats import MAX_NAMES, NONE, OTHER, STAGE_BUCKETS_S, JobStats, Refusals
from acestep_schemas.events import Completed, ErrorCode, ErrorReport, LmChoice, ModelChoice, Timings, Unfinished
from tests.support.jobs import make_job, make_manifest, make_track
from tests.support.metrics_page import samples_in, samples_of

PAGE = Path(__file__).parent / "pages/jobs.prom"
TIMINGS = Timings(queued=3, plan=0.2, render=2, encode=0.05, upload=0.3, total=2.6)
LM = LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt")


def completed(job: Job, **fields: object) -> Completed:
    return make_manifest(job).model_copy(update={"timings": TIMINGS, **fields})


def failed(
    job: Job | None,
    code: ErrorCode = ErrorCode.RENDER_FAILED,
    attempt: int = 1,
    status: Literal["failed", "rejected", "cancelled"] = "failed",
) -> Unfinished:
    return Unfinished(
        task_id="t",
        status=status,
        attempt=attempt,
        worker_id="w",
        finished_at=datetime.now(UTC),
        error=ErrorReport(code=code, message="", retryable=False, attempts=attempt),
        policy=job.policy if job else None,
    )


def jobs(stats: JobStats) -> dict[str, float]:
    """Jobs by state, model and tier; those labels as on the page."""
    return {name: value for name, value in samples_of(stats.collect).items() if name.startswith("acestep_jobs_total")}


def label(state: str, model: str, tier: str) -> str:
    return f'acestep_jobs_total{{model="{model}",state="{state}",tier="{tier}"}}'


def stage(stats: JobStats, what: str) -> dict[str, float]:
    """`sum` or `count` of each stage."""
    found = samples_of(stats.collect)
    return {name: found[f'acestep_stage_seconds_{what}{{stage="{name}"}}'] for name in Timings.model_fields}


def test_a_job_is_counted_by_state_model_and_tier_and_each_stage_is_timed() -> None:
    stats, job = JobStats(), make_job()
    stats.job_ended(completed(job), job)
    assert jobs(stats) == {label("completed", "acestep-v15-turbo", "tier1"): 1}
    assert stage(stats, "sum") == TIMINGS.model_dump()
    assert set(stage(stats, "count").values()) == {1}


def test_a_message_that_nobody_could_read_has_neither_model_nor_tier() -> None:
    stats = JobStats()
    stats.job_ended(failed(None, ErrorCode.MALFORMED_BODY), None)
    assert jobs(stats) == {label("failed", NONE, NONE): 1}
    errors = {name: n for name, n in samples_of(stats.collect).items() if name.startswith("acestep_job_errors")}
    assert {name: n for name, n in errors.items() if n} == {'acestep_job_errors_total{code="malformed_body"}': 1}
    assert len(errors) == len(ErrorCode)
    assert set(stage(stats, "count").values()) == {0}


def test_redeliveries_later_attempts_and_repeated_events_are_counted() -> None:
    stats, job = JobStats(), make_job()
    stats.job_ended(failed(job, attempt=3), job, redelivered=True)
    stats.job_ended(completed(job), job)
    stats.event_repeated()
    found = samples_of(stats.collect)
    names = ("acestep_redeliveries_total", "acestep_retried_jobs_total", "acestep_repeated_events_total")
    assert [found[name] for name in names] == [1, 1, 1]


def test_audio_codes_count_when_the_language_model_wrote_them() -> None:
    stats, job = JobStats(), make_job()
    codes = ((1, 2, 3), (4, 5))
    stats.job_ended(completed(job, lm=LM, audio_codes=codes), job)
    given = job.request.model_copy(update={"audio_code_string": "<|audio_code_1|>"})
    stats.job_ended(completed(job, lm=LM, audio_codes=codes, request=given), job)
    stats.job_ended(completed(job, audio_codes=codes), job)
    assert samples_of(stats.collect)["acestep_lm_audio_codes_total"] == 5


def test_the_songs_of_completed_jobs_count_as_delivered_and_those_of_a_repeated_event_do_not(tmp_path: Path) -> None:
    stats, job = JobStats(), make_job()
    song = StoredObject(track=make_track(tmp_path / "0.wav"), uri="s3://b/t/0.wav", url=None, bytes=4, sha256="0" * 64)
    stats.job_ended(make_manifest(job, (song, song)), job)
    stats.job_ended(failed(job, ErrorCode.CANCELLED, status="cancelled"), job)
    stats.event_repeated()
    found = samples_of(stats.collect)
    assert (found["acestep_songs_total"], found["acestep_audio_seconds_total"]) == (2, 3)


def test_between_ten_seconds_and_three_minutes_a_quantile_is_right_to_a_third() -> None:
    """A quantile is interpolated within a bucket: songs and waits are mostly in this range."""
    ends = [bound for bound in STAGE_BUCKETS_S if 10 <= bound <= 180]
    assert (ends[0], ends[-1]) == (10, 180)
    assert all(end <= 1.5 * start for start, end in pairwise(ends))


def test_an_estimate_is_compared_with_what_the_job_took() -> None:
    stats, job = JobStats(), make_job()
    stats.job_ended(completed(job), job, expected_s=1.3)
    stats.job_ended(completed(job), job)
    found = samples_of(stats.collect)
    assert found["acestep_eta_expected_seconds_total"] == 1.3
    assert found["acestep_eta_actual_seconds_total"] == 2.6
    assert found["acestep_eta_error_ratio_sum"] == pytest.approx(0.5)
    assert found["acestep_eta_error_ratio_count"] == 1


def test_names_do_not_grow_without_bound() -> None:
    stats, job = JobStats(), make_job()
    for number in range(1000):
        other = replace(job, model=ModelChoice(requested=None, used=f"model-{number}", fallback=False))
        stats.job_ended(completed(job), other)
    assert len(jobs(stats)) <= MAX_NAMES + 1
    assert sum(jobs(stats).values()) == 1000
    assert jobs(stats)[label("completed", OTHER, "tier1")] == 1000 - MAX_NAMES + 1


@pytest.mark.parametrize(("seconds", "bucket"), [(0, 0), (0.05, 0), (0.051, 1), (1800, 19), (1801, 20)])
def test_a_bucket_ends_at_its_bound(seconds: float, bucket: int) -> None:
    stats, job = JobStats(), make_job()
    stats.job_ended(completed(job, timings=Timings(total=seconds)), job)
    found, ends = samples_of(stats.collect), (*map(str, map(float, STAGE_BUCKETS_S)), "+Inf")
    counts = [found[f'acestep_stage_seconds_bucket{{le="{end}",stage="total"}}'] for end in ends]
    assert counts == [0] * bucket + [1] * (len(ends) - bucket)


def test_a_refused_publish_is_counted_and_a_lost_connection_is_not() -> None:
    refusals = Refusals()
    for error in (Nacked(), Unroutable(), Unroutable(), ConnectionLost()):
        refusals.add(error)
    assert samples_of(refusals.collect) == {
        'acestep_publishes_refused_total{reason="nacked"}': 1,
        'acestep_publishes_refused_total{reason="unroutable"}': 2,
    }


def test_counting_a_job_takes_less_than_a_fifth_of_a_millisecond() -> None:
    """About 15 µs on a quiet machine; the bound leaves room for a busy one. The best of five rounds counts."""
    stats, job = JobStats(), make_job()
    manifest = completed(job)

    def round_of(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            stats.job_ended(manifest, job, redelivered=True, expected_s=2)
        return (time.perf_counter() - start) / count

    assert min(round_of(1000) for _ in range(5)) < 200e-6


def test_a_run_of_jobs_gives_what_the_first_release_gave_and_more_buckets_and_songs() -> None:
    stats, refusals, job = JobStats(), Refusals(), make_job()
    for number in range(40):
        seconds = 0.03 * 1.4**number
        timings = Timings(queued=seconds, plan=0.05, render=seconds / 3, encode=0.01, upload=0.5, total=seconds)
        ending = completed(job, timings=timings, lm=LM, audio_codes=((1, 2, 3),) * (number % 3))
        model = ModelChoice(requested=None, used=f"model-{number % 20}", fallback=False)
        expected_s = 10 if number % 2 else None
        stats.job_ended(ending, replace(job, model=model), redelivered=number % 4 == 0, expected_s=expected_s)
    stats.job_ended(failed(job, attempt=3), job, redelivered=True)
    stats.job_ended(failed(None, ErrorCode.MALFORMED_BODY, status="rejected"), None)
    stats.job_ended(failed(job, ErrorCode.CANCELLED, status="cancelled"), job)
    stats.event_repeated()
    stats.event_repeated()
    for error in (Nacked(), Unroutable(), Unroutable(), OSError()):
        refusals.add(error)
    found, before = samples_of(stats.collect, refusals.collect), samples_in(PAGE.read_text())
    assert {name: found[name] for name in before} == before
    added = {name for name in found.keys() - before.keys() if not name.startswith("acestep_stage_seconds_bucket")}
    assert added == {"acestep_songs_total", "acestep_audio_seconds_total"}
