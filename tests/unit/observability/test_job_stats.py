# SPDX-License-Identifier: Apache-2.0
"""What a worker counts: each job once, under names that cannot grow, at a cost that nobody notices."""

import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from acestep_consumer.broker.errors import ConnectionLost, Nacked, Unroutable
from acestep_consumer.domain.job import Job
from acestep_consumer.observability.job_stats import BOUNDS_S, MOST_NAMES, NONE, OTHER, Histogram, JobStats, Refusals
from acestep_schemas.events import Completed, ErrorCode, ErrorReport, LmChoice, ModelChoice, Timings, Unfinished
from tests.support.jobs import make_job, make_manifest

TIMINGS = Timings(queued=3, plan=0.2, render=2, encode=0.05, upload=0.3, total=2.6)


def completed(job: Job, **fields: object) -> Completed:
    return make_manifest(job).model_copy(update={"timings": TIMINGS, **fields})


def failed(job: Job | None, code: ErrorCode = ErrorCode.RENDER_FAILED, attempt: int = 1) -> Unfinished:
    return Unfinished(
        task_id="t",
        status="failed",
        attempt=attempt,
        worker_id="w",
        finished_at=datetime.now(UTC),
        error=ErrorReport(code=code, message="", retryable=False, attempts=attempt),
        policy=job.policy if job else None,
    )


def test_a_job_is_counted_by_state_model_and_tier_and_each_stage_is_timed() -> None:
    tally, job = JobStats(), make_job()
    tally.job_ended(completed(job), job)
    assert tally.jobs == {("completed", "acestep-v15-turbo", "tier1"): 1}
    assert {stage: histogram.total for stage, histogram in tally.stages.items()} == TIMINGS.model_dump()
    assert all(sum(histogram.counts) == 1 for histogram in tally.stages.values())


def test_a_message_that_nobody_could_read_has_neither_model_nor_tier() -> None:
    tally = JobStats()
    tally.job_ended(failed(None, ErrorCode.MALFORMED_BODY), None)
    assert tally.jobs == {("failed", NONE, NONE): 1}
    assert tally.errors["malformed_body"] == 1
    assert sum(tally.errors.values()) == 1
    assert all(sum(histogram.counts) == 0 for histogram in tally.stages.values())


def test_a_job_that_failed_is_timed_as_far_as_it_came() -> None:
    tally, job = JobStats(), make_job()
    tally.job_ended(failed(job), job, timings=Timings(plan=0.2, total=5))
    assert tally.stages["total"].total == 5
    assert sum(tally.stages["render"].counts) == 0


def test_redeliveries_later_attempts_and_repeated_events_are_counted() -> None:
    tally, job = JobStats(), make_job()
    tally.job_ended(failed(job, attempt=3), job, redelivered=True)
    tally.job_ended(completed(job), job)
    tally.event_repeated()
    assert (tally.redeliveries, tally.retries, tally.repeats) == (1, 1, 1)


def test_audio_codes_count_when_the_language_model_wrote_them() -> None:
    tally, job = JobStats(), make_job()
    lm, codes = LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt"), ((1, 2, 3), (4, 5))
    tally.job_ended(completed(job, lm=lm, audio_codes=codes), job)
    given = job.request.model_copy(update={"audio_code_string": "<|audio_code_1|>"})
    tally.job_ended(completed(job, lm=lm, audio_codes=codes, request=given), job)
    tally.job_ended(completed(job, audio_codes=codes), job)
    assert tally.lm_codes == 5


def test_an_estimate_is_compared_with_what_the_job_took() -> None:
    tally, job = JobStats(), make_job()
    tally.job_ended(completed(job), job, expected_s=1.3)
    tally.job_ended(completed(job), job)
    assert (tally.expected_s, tally.estimated_s) == (1.3, 2.6)
    assert tally.estimate_error.total == pytest.approx(0.5)


def test_names_do_not_grow_without_bound() -> None:
    tally, job = JobStats(), make_job()
    for number in range(1000):
        other = replace(job, model=ModelChoice(requested=None, used=f"model-{number}", fallback=False))
        tally.job_ended(completed(job), other)
    assert len(tally.jobs) <= MOST_NAMES + 1
    assert sum(tally.jobs.values()) == 1000
    assert tally.jobs["completed", OTHER, "tier1"] == 1000 - MOST_NAMES + 1


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (0.05, 0), (0.051, 1), (1800, 13), (1801, 14)])
def test_a_bucket_ends_at_its_bound(value: float, bucket: int) -> None:
    histogram = Histogram()
    histogram.add(value)
    assert [number for number, count in enumerate(histogram.counts) if count] == [bucket]
    assert len(histogram.counts) == len(BOUNDS_S) + 1


def test_a_refused_publish_is_counted_and_a_lost_link_is_not() -> None:
    refusals = Refusals()
    for fault in (Nacked(), Unroutable(), Unroutable(), ConnectionLost()):
        refusals.add(fault)
    assert refusals.counts == {"nacked": 1, "unroutable": 2}


def test_counting_a_job_takes_less_than_a_fifth_of_a_millisecond() -> None:
    """About 6 µs on a quiet machine; the bound leaves room for a busy one. The best of five rounds counts."""
    tally, job = JobStats(), make_job()
    manifest = completed(job)

    def round_of(jobs: int) -> float:
        start = time.perf_counter()
        for _ in range(jobs):
            tally.job_ended(manifest, job, redelivered=True, expected_s=2)
        return (time.perf_counter() - start) / jobs

    assert min(round_of(1000) for _ in range(5)) < 200e-6
