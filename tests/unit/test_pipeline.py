# SPDX-License-Identifier: Apache-2.0
"""The pipeline on fakes: events, their order, and the settlement of the delivery."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from acestep_consumer.domain.errors import (
    Cancelled,
    EngineCrashed,
    Expired,
    Interrupted,
    RenderFailed,
    StorageUnavailable,
    Unpublished,
    Verdict,
)
from acestep_consumer.domain.job import Attempt, Job, Plan, Rendering, Sources, StoredObject
from acestep_consumer.domain.outcome import AUDIO_DELETED, OTHER_BODY, RunInfo, TerminalRecord, unfinished
from acestep_consumer.domain.parse import RequestRules
from acestep_consumer.domain.ports import BodyFormat, Report, Routes
from acestep_consumer.domain.stages import EngineCapacity
from acestep_consumer.engine.adapters import DirectPlanner
from acestep_consumer.execution import retries
from acestep_consumer.execution.eta import CostModel
from acestep_consumer.execution.retries import RetryPolicy
from acestep_consumer.execution.runner import JobRules, JobRunner
from acestep_consumer.execution.stage_limits import StageLimits
from acestep_consumer.execution.tier_forwarding import NoForwarding, TierForwarding
from acestep_consumer.inputs.source_songs import StoredSongs
from acestep_consumer.observability.job_stats import JobObserver, JobStats
from acestep_consumer.pipeline import Pipeline, Ports
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_schemas.events import Completed, JobCompleted, JobEvent, JobFailed, JobRejected, JobStarted, Unfinished
from acestep_schemas.request import field_names
from tests.support.admission import make_limits
from tests.support.fake_engine import FakeRenderer, NoInputs
from tests.support.fake_store import FakeStore
from tests.support.fakes import FakeAttempts, FakeCancellations, FakeDelivery, FakeEvents
from tests.support.jobs import make_failure
from tests.support.metrics_page import samples_of
from tests.support.waiting import eventually


@dataclass
class Harness:
    """A pipeline on fakes, with everything in reach."""

    scratch: Path
    timeout_s: float | None = None
    store: FakeStore = field(default_factory=FakeStore)
    renderer: FakeRenderer = field(default_factory=FakeRenderer)
    events: FakeEvents = field(default_factory=FakeEvents)
    attempts: FakeAttempts = field(default_factory=FakeAttempts)
    cancellations: FakeCancellations = field(default_factory=FakeCancellations)
    routes: Routes = field(default_factory=NoForwarding)
    stats: JobStats = field(default_factory=JobStats)
    stages: StageLimits = field(default_factory=StageLimits)

    @asynccontextmanager
    async def folder(self, task_id: str) -> AsyncIterator[Path]:
        with TemporaryDirectory(prefix=task_id, dir=self.scratch) as folder:
            yield Path(folder)

    def pipeline(self) -> Pipeline:
        self.retries = RetryPolicy(self.attempts, most=3)
        costs = CostModel()
        ports = Ports(
            inputs=NoInputs(),
            planner=DirectPlanner(self.renderer),
            renderer=self.renderer,
            store=self.store,
            events=self.events,
            observer=JobObserver(self.stats, costs),
        )
        runner = JobRunner(
            retries=self.retries,
            cancellations=self.cancellations,
            routes=self.routes,
            songs=StoredSongs(self.store, allowed=True),
            store=self.store,
            events=self.events,
            costs=costs,
            rules=JobRules(
                worker_id="worker-1",
                scratch=self.folder,
                tier_limits=make_limits,
                request_rules=RequestRules(max_bytes=10_000),
                execution_timeout_s=self.timeout_s,
                stages=self.stages,
            ),
        )
        return Pipeline(ports, runner)

    async def process(self, delivery: FakeDelivery) -> FakeDelivery:
        await self.pipeline().process(delivery)
        return delivery

    def unfinished(self) -> Unfinished:
        event = self.events.published[-1][0]
        assert not isinstance(event, JobCompleted)
        assert isinstance(event.data, Unfinished)
        return event.data


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def request(**fields: object) -> FakeDelivery:
    return FakeDelivery(body=json.dumps({"task_id": "song", "prompt": "jazz", **fields}).encode())


async def test_codes_of_source_audio_are_in_the_event_and_no_song_is_rendered(harness: Harness) -> None:
    await harness.process(request(extract_codes_only=True, src_audio_path="s3://songs/a.wav"))
    event = harness.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert (event.data.audios, event.data.audio_codes, event.data.lm) == ((), ((1,) * 5,), None)
    assert event.data.metas.duration == 1.0
    assert harness.renderer.rendered == []


async def test_audio_in_the_request_is_in_no_event_no_object_and_no_log(harness: Harness) -> None:
    with capture_logs() as logs:
        await harness.process(request(task_type="cover", src_audio_base64="U0VDUkVU", lyrics="la"))
        await harness.process(request(task_id="other", task_type="cover", src_audio_base64="U0VDUkVU%"))
    assert [event.state for event, _ in harness.events.published if event.state != "progress"] == [
        "started",
        "completed",
        "rejected",
    ]
    written = [event.to_json() for event, _ in harness.events.published]
    assert "U0VDUkVU" not in f"{written}{harness.store.objects}{logs}"


async def test_a_request_is_started_rendered_stored_published_and_acked(harness: Harness) -> None:
    delivery = await harness.process(request(batch_size=2, seed=7, audio_duration=30))
    assert (harness.events.states[0], harness.events.states[-1]) == ("started", "completed")
    assert delivery.verdict is Verdict.ACK
    event = harness.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert [audio.seed for audio in event.data.audios] == [7, 8]
    assert event.data.request.audio_duration == 30
    assert event.data.worker_id == "worker-1"
    assert event.data.timings.total is not None


async def test_a_running_job_is_counted_in_the_stage_that_it_is_in(harness: Harness) -> None:
    seen: list[dict[str, int]] = []

    class Reporting(FakeRenderer):
        async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
            # As the renderer reports; the last three are of a second process, after the first one died.
            for fraction, name in ((0.0, "render"), (0.5, "render"), (1.0, "render"), (0.5, "encode"), (0.1, "render")):
                report(fraction, name)
                seen.append({at: count for at, count in harness.stats.running.jobs.items() if count})
            return await super().render(job, plan, sources, folder, report)

    harness.renderer = Reporting()
    await harness.process(request())
    assert seen == [{"render": 1}, {"render": 1}, {"encode": 1}, {"encode": 1}, {"render": 1}]
    assert set(harness.stats.running.jobs.values()) == {0}


async def test_jobs_wait_for_a_place_in_the_renderer_and_the_highest_priority_gets_the_next(harness: Harness) -> None:
    """Two are rendered at a time: the renderer has no room for more than the least that it takes."""
    go = asyncio.Semaphore(0)

    async def hold(_job: Job) -> None:
        await go.acquire()

    harness.stages = StageLimits(lambda: EngineCapacity(pack_s=0.1))
    harness.renderer.before = hold
    pipeline = harness.pipeline()
    jobs = []
    for number, priority in enumerate((0, 0, 0, 9)):
        delivery = request(task_id=f"t{number}")
        delivery.priority = priority
        jobs.append(asyncio.create_task(pipeline.process(delivery)))
    await eventually(lambda: harness.stages.waiting["render"] == 2)
    assert harness.stats.running.jobs["render"] == 4
    for _ in jobs:
        go.release()
    await asyncio.gather(*jobs)
    assert harness.renderer.rendered == ["t0", "t1", "t3", "t2"]
    assert harness.renderer.most_at_once == 2
    assert (set(harness.stages.waiting.values()), harness.stages.gate("render").jobs) == ({0}, 0)


async def test_a_job_that_fails_is_in_no_stage(harness: Harness) -> None:
    async def fail(job: Job) -> None:
        raise RenderFailed("no")

    harness.renderer.before = fail
    await harness.process(request())
    assert harness.unfinished().error.code == "render_failed"
    assert set(harness.stats.running.jobs.values()) == {0}


async def test_each_finished_job_is_logged_once(harness: Harness) -> None:
    with capture_logs() as logs:
        await harness.process(request(batch_size=2))
        await harness.process(request(batch_size=2))
    done, again = logs
    assert (done["event"], done["songs"], done["attempt"]) == ("job done", 2, 1)
    assert done["total_s"] >= 0
    assert again["event"] == "job had ended before: event repeated"


async def test_the_event_comes_after_the_manifest_and_the_settlement_after_the_event(harness: Harness) -> None:
    order: list[str] = []
    delivery = request()
    commit, publish, settle = harness.store.commit, harness.events.publish, delivery.settle

    async def spy(name: str, call, *args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
        result = await call(*args)
        order.append(name)
        return result

    harness.store.commit = lambda *given: spy("manifest", commit, *given)  # type: ignore[method-assign]
    harness.events.publish = lambda event, reply: spy(str(event.state), publish, event, reply)  # type: ignore[method-assign]
    delivery.settle = lambda verdict, reason=None: spy("settled", settle, verdict, reason)  # type: ignore[method-assign]
    await harness.process(delivery)
    assert [step for step in order if step not in ("started", "progress")] == ["manifest", "completed", "settled"]
    assert order.index("started") < order.index("completed")


async def test_a_redelivery_that_finds_the_manifest_repeats_the_event_without_rendering(harness: Harness) -> None:
    await harness.process(request())
    first = harness.events.published[-1][0]
    again = await harness.process(FakeDelivery(body=request().body, redelivered=True))
    assert harness.events.published[-1][0].to_json() == first.to_json()
    assert harness.renderer.rendered == ["song"]
    assert again.verdict is Verdict.ACK


async def test_songs_that_lost_a_race_to_another_worker_are_not_counted_as_delivered(
    harness: Harness, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Harness(tmp_path / "other", store=harness.store)

    async def other_is_faster(_: Job) -> None:
        await other.process(FakeDelivery(body=request(batch_size=2).body, redelivered=True))

    harness.renderer.before = other_is_faster
    await harness.process(request(batch_size=2))
    assert harness.events.published[-1][0].to_json() == other.events.published[-1][0].to_json()
    counted = [samples_of(each.stats.collect) for each in (harness, other)]
    assert [found["acestep_songs_total"] for found in counted] == [0, 2]
    assert [found["acestep_repeated_events_total"] for found in counted] == [1, 0]


async def test_two_deliveries_of_one_task_run_one_after_the_other_and_render_once(harness: Harness) -> None:
    async def slowly(_: Job) -> None:
        await asyncio.sleep(0.01)

    harness.renderer.before = slowly
    pipeline = harness.pipeline()
    await asyncio.gather(*(pipeline.process(request()) for _ in range(5)))
    assert harness.renderer.rendered == ["song"]
    completed = [event for event, _ in harness.events.published if isinstance(event, JobCompleted)]
    assert len({event.to_json() for event in completed}) == 1
    assert len(completed) == 5


async def test_deliveries_of_different_tasks_run_concurrently(harness: Harness) -> None:
    together = asyncio.Barrier(3)

    async def meet(_: Job) -> None:
        await together.wait()

    harness.renderer.before = meet
    pipeline = harness.pipeline()
    async with asyncio.timeout(10):
        await asyncio.gather(*(pipeline.process(request(task_id=f"song-{n}")) for n in range(3)))
    assert harness.renderer.most_at_once == 3


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"not json", "malformed_body"),
        (b'["a", "list"]', "malformed_body"),
        (b'{"task_id": "song", "task_type": "dance"}', "invalid_request"),
        (b'{"task_id": "song", "prompt": "' + b"x" * 10_000 + b'"}', "message_too_large"),
        (b'{"task_id": "song", "audio_duration": 9000, "on_limit": "reject"}', "limit_exceeded"),
    ],
)
async def test_bad_input_is_rejected_with_a_reason_and_dead_lettered(harness: Harness, body: bytes, code: str) -> None:
    delivery = await harness.process(FakeDelivery(body=body, message_id="song"))
    assert isinstance(harness.events.published[-1][0], JobRejected)
    assert harness.unfinished().error.code == code
    assert harness.unfinished().task_id == "song"
    assert delivery.verdict is Verdict.DEAD_LETTER
    assert delivery.reason is not None
    assert harness.renderer.rendered == []


async def test_an_oversized_message_is_rejected_under_the_id_in_its_body(harness: Harness) -> None:
    body = b'{"task_id": "song", "prompt": "' + b"x" * 10_000 + b'"}'
    delivery = await harness.process(FakeDelivery(body=body))
    assert (harness.unfinished().task_id, harness.unfinished().error.code) == ("song", "message_too_large")
    assert delivery.verdict is Verdict.DEAD_LETTER


@pytest.mark.parametrize("body", [b"\xff\xfe", b'{"prompt": "jazz"}'])
async def test_a_message_without_any_id_is_published_again_with_one_and_acked(harness: Harness, body: bytes) -> None:
    delivery = await harness.process(FakeDelivery(body=body))
    assert (delivery.identified, delivery.verdict) == (True, Verdict.ACK)
    assert (harness.events.published, harness.renderer.rendered) == ([], [])


async def test_a_message_that_cannot_be_given_an_id_goes_back_to_the_queue(harness: Harness) -> None:
    delivery = FakeDelivery(body=b'{"prompt": "jazz"}')

    async def unconfirmed() -> None:
        raise Unpublished("no confirm")

    delivery.identify = unconfirmed  # type: ignore[method-assign]
    await harness.process(delivery)
    assert (delivery.verdict, harness.events.published) == (Verdict.REQUEUE, [])


async def test_a_job_that_breaks_is_failed_and_dead_lettered_and_leaves_no_files(harness: Harness) -> None:
    async def crash(_: Job) -> None:
        raise EngineCrashed("the renderer process ended with exit code -9")

    harness.renderer.before = crash
    delivery = await harness.process(request())
    assert harness.events.states == ["started", "failed"]
    assert (harness.unfinished().error.code, harness.unfinished().error.retryable) == ("engine_crashed", True)
    assert delivery.verdict is Verdict.DEAD_LETTER
    assert list(harness.scratch.iterdir()) == []


async def test_a_bug_is_reported_without_its_text(harness: Harness) -> None:
    async def bug(_: Job) -> None:
        raise KeyError("/home/secret/path")

    harness.renderer.before = bug
    await harness.process(request())
    assert isinstance(harness.events.published[-1][0], JobFailed)
    assert harness.unfinished().error.code == "internal_error"
    assert "secret" not in harness.unfinished().model_dump_json()


async def test_a_cancelled_job_ends_as_cancelled_and_is_acked(harness: Harness) -> None:
    async def cancel(_: Job) -> None:
        raise Cancelled

    harness.renderer.before = cancel
    delivery = await harness.process(request())
    assert harness.events.states[-1] == "cancelled"
    assert delivery.verdict is Verdict.ACK


async def test_a_cancelled_coroutine_settles_and_publishes_nothing(harness: Harness) -> None:
    began = asyncio.Event()

    async def forever(_: Job) -> None:
        began.set()
        await asyncio.Event().wait()

    harness.renderer.before = forever
    delivery = request()
    task = asyncio.create_task(harness.process(delivery))
    await began.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert not delivery.settled
    assert "failed" not in harness.events.states
    assert list(harness.scratch.iterdir()) == []


async def test_an_event_that_cannot_be_confirmed_leaves_the_delivery_unsettled(harness: Harness) -> None:
    harness.events.down = True
    delivery = request()
    with pytest.raises(Unpublished):
        await harness.process(delivery)
    assert not delivery.settled


async def test_storage_that_is_gone_fails_the_job_with_its_own_code(harness: Harness) -> None:
    async def gone(_: str) -> None:
        raise StorageUnavailable("s3://acestep: gave up")

    harness.store.find = gone  # type: ignore[method-assign, assignment]
    await harness.process(request())
    assert harness.unfinished().error.code == "storage_unavailable"


async def test_a_job_over_the_execution_timeout_is_stopped(tmp_path: Path) -> None:
    harness = Harness(tmp_path, timeout_s=0.05)

    async def forever(_: Job) -> None:
        await asyncio.Event().wait()

    harness.renderer.before = forever
    await harness.process(request())
    assert harness.unfinished().error.code == "execution_timeout"


async def test_the_terminal_event_answers_the_requester_under_its_correlation_id(harness: Harness) -> None:
    delivery = request()
    delivery.reply = type(delivery.reply)(reply_to="answers", correlation_id="c-1")
    await harness.process(delivery)
    (queue, event) = harness.events.answers[0]
    assert (queue, str(event.state), len(harness.events.answers)) == ("answers", "completed", 1)
    assert {reply.correlation_id for _, reply in harness.events.published} == {"c-1"}


async def test_unknown_fields_become_warnings_in_the_event(harness: Harness) -> None:
    await harness.process(request(mood="blue"))
    event = harness.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert any("mood" in warning for warning in event.data.warnings)


async def test_the_redelivery_of_a_failed_message_repeats_the_event_and_is_not_tried_again(harness: Harness) -> None:
    async def crash(_: Job) -> None:
        raise EngineCrashed("the renderer process ended with exit code -9")

    harness.renderer.before = crash
    await harness.process(request())
    again = await harness.process(FakeDelivery(body=request().body, redelivered=True))
    first, second = (event.to_json() for event, _ in harness.events.published if event.state == "failed")
    assert first == second
    assert harness.events.states.count("started") == 1
    assert again.verdict is Verdict.DEAD_LETTER
    assert again.reason is not None
    assert again.reason.code == "engine_crashed"


async def test_the_redelivery_of_a_rejected_message_repeats_the_event(harness: Harness) -> None:
    body = b'{"task_id": "song", "task_type": "dance"}'
    await harness.process(FakeDelivery(body=body))
    await harness.process(FakeDelivery(body=body, redelivered=True))
    first, second = (event.to_json() for event, _ in harness.events.published)
    assert first == second


async def test_a_failed_task_that_is_published_again_is_tried_again(harness: Harness) -> None:
    async def crash(_: Job) -> None:
        raise EngineCrashed("the renderer process ended with exit code -9")

    harness.renderer.before = crash
    await harness.process(request())
    harness.renderer.before = None
    sent_anew = await harness.process(request())
    assert harness.events.states[-1] == "completed"
    assert sent_anew.verdict is Verdict.ACK


async def test_a_failure_is_repeated_when_a_crashed_broker_has_lost_the_redelivered_flag(harness: Harness) -> None:
    async def crash(_: Job) -> None:
        raise EngineCrashed("the renderer process ended with exit code -9")

    harness.renderer.before = crash
    sent = datetime(2026, 1, 1, tzinfo=UTC)
    for _ in range(2):
        await harness.process(FakeDelivery(body=request().body, sent=sent))
    await harness.process(FakeDelivery(body=request().body, sent=sent + timedelta(seconds=1)))
    failures = [event.to_json() for event, _ in harness.events.published if event.state == "failed"]
    assert failures[0] == failures[1] != failures[2]
    assert harness.events.states.count("started") == 2


async def test_a_running_job_stops_when_it_is_cancelled(harness: Harness) -> None:
    stopped = asyncio.Event()

    async def forever(_: Job) -> None:
        await harness.cancellations.ask("song")
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    harness.renderer.before = forever
    delivery = await harness.process(request())
    assert stopped.is_set()
    assert (harness.events.states[-1], delivery.verdict) == ("cancelled", Verdict.ACK)
    assert list(harness.scratch.iterdir()) == []


async def test_a_job_that_was_cancelled_in_the_queue_does_not_start(harness: Harness) -> None:
    await harness.cancellations.ask("song")
    delivery = await harness.process(request())
    assert (harness.events.states, delivery.verdict) == (["cancelled"], Verdict.ACK)


async def test_a_cancellation_that_comes_too_late_changes_nothing(harness: Harness) -> None:
    await harness.process(request())
    await harness.cancellations.ask("song")
    await harness.process(FakeDelivery(body=request().body, redelivered=True))
    assert harness.events.states.count("completed") == 2
    assert "cancelled" not in harness.events.states


async def test_a_stop_of_the_worker_in_the_moment_of_a_cancellation_settles_nothing(harness: Harness) -> None:
    async def forever(_: Job) -> None:
        harness.cancellations.asked.add("song")
        task.cancel()
        await asyncio.Event().wait()

    harness.renderer.before = forever
    delivery = request()
    task = asyncio.create_task(harness.process(delivery))
    await asyncio.wait((task,))
    assert task.cancelled()
    assert not delivery.settled


async def test_a_job_past_its_deadline_in_the_queue_expires_and_does_not_start(harness: Harness) -> None:
    late = request(queue_deadline_s=5)
    late.queued_s = 6.0
    await harness.process(late)
    assert harness.events.states == ["expired"]
    assert harness.unfinished().error.code == "expired"
    assert late.verdict is Verdict.DEAD_LETTER


async def test_a_deadline_without_a_timestamp_is_a_warning(harness: Harness) -> None:
    await harness.process(request(queue_deadline_s=5))
    event = harness.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert any("queue_deadline_s" in warning for warning in event.data.warnings)


async def test_a_first_try_is_not_blamed_and_has_all_its_tries(harness: Harness) -> None:
    jobs: list[Job] = []

    async def note(job: Job) -> None:
        jobs.append(job)

    harness.renderer.before = note
    await harness.process(request())
    assert [job.tries for job in jobs] == [3]
    assert [attempt.number for attempt in harness.attempts.begun] == [1]
    assert harness.attempts.excused == []


async def test_a_job_whose_worker_died_too_often_fails_without_another_try(harness: Harness) -> None:
    harness.attempts.unexplained = 3
    delivery = request()
    delivery.redelivered = True
    await harness.process(delivery)
    assert harness.events.states == ["failed"]
    assert harness.unfinished().error.code == "engine_crashed"
    assert harness.attempts.begun == []
    assert delivery.verdict is Verdict.DEAD_LETTER


async def test_the_last_attempt_of_a_suspect_runs_alone(harness: Harness) -> None:
    """Two neighbours are at work when it comes; it waits for them, and the next one waits for it."""
    harness.attempts.unexplained = 2
    at_once: dict[str, int] = {}
    go, working = asyncio.Event(), set[str]()

    async def note(job: Job) -> None:
        working.add(job.task_id)
        at_once[job.task_id] = len(working)
        await go.wait()
        working.discard(job.task_id)

    harness.renderer.before = note
    pipeline = harness.pipeline()
    neighbours = [asyncio.create_task(pipeline.process(request(task_id=f"n{number}"))) for number in range(2)]
    await eventually(lambda: len(working) == 2)
    suspect = request(task_id="suspect")
    suspect.redelivered = True
    others = [asyncio.create_task(pipeline.process(each)) for each in (suspect, request(task_id="n3"))]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*neighbours, *others)
    assert (at_once["suspect"], at_once["n3"]) == (1, 1)


async def test_a_worker_that_stops_excuses_the_attempts_that_it_requeues(harness: Harness) -> None:
    began = asyncio.Event()

    async def forever(_: Job) -> None:
        began.set()
        await asyncio.Event().wait()

    harness.renderer.before = forever
    task = asyncio.create_task(harness.process(request()))
    await began.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert [attempt.task_id for attempt in harness.attempts.excused] == ["song"]


async def test_a_broker_that_took_a_message_back_is_no_fault_of_the_message(harness: Harness) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def long(_: Job) -> None:
        began.set()
        await go.wait()

    harness.renderer.before = long
    pipeline = harness.pipeline()
    delivery = request()
    task = asyncio.create_task(pipeline.process(delivery))
    await began.wait()
    await harness.retries.excuse_lost()
    assert harness.attempts.excused == []
    delivery.stale = True
    await harness.retries.excuse_lost()
    await harness.retries.excuse_lost()
    go.set()
    await task
    assert [attempt.number for attempt in harness.attempts.renewed] == [1]


async def test_an_attempt_that_fails_after_its_message_was_taken_back_is_over(harness: Harness) -> None:
    delivery = request()

    async def breaks(_: Job) -> None:
        delivery.stale = True
        raise RenderFailed("broken")

    harness.renderer.before = breaks
    await harness.process(delivery)
    assert [attempt.number for attempt in harness.attempts.excused] == [1]
    assert "failed" not in harness.events.states


@pytest.mark.parametrize("redelivered", [True, False])
async def test_a_deadline_that_passed_is_told_at_once_unless_a_worker_had_the_message_in_time(
    harness: Harness, *, redelivered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "LOOK_S", 0)
    harness.attempts.others = [(b"1",), (b"2",), ()]
    late = request(queue_deadline_s=5)
    late.queued_s, late.redelivered = 60.0, redelivered
    await harness.process(late)
    assert harness.events.states == ["expired"]
    assert len(harness.attempts.others) == (1 if redelivered else 3)


TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


async def test_the_producers_trace_is_in_every_event_and_in_repeated_ones(harness: Harness) -> None:
    traced = request()
    traced.traceparent = TRACE
    await harness.process(traced)
    await harness.process(FakeDelivery(body=request().body, redelivered=True))
    assert {event.traceparent for event, _ in harness.events.published} == {TRACE}
    assert b"traceparent" not in (await untraced(harness)).to_json()


async def untraced(harness: Harness) -> JobEvent:
    await harness.process(request(task_id="untraced"))
    return harness.events.published[-1][0]


async def test_a_job_is_counted_once_and_a_repeat_as_a_repeat(harness: Harness) -> None:
    pipeline = harness.pipeline()
    for redelivered in (False, True):
        await pipeline.process(FakeDelivery(body=request().body, redelivered=redelivered))
    found = samples_of(harness.stats.collect)
    assert found['acestep_jobs_total{model="acestep-v15-turbo",state="completed",tier="tier6"}'] == 1
    assert found["acestep_repeated_events_total"] == 1


async def test_the_second_job_of_a_kind_has_an_estimate(harness: Harness) -> None:
    pipeline = harness.pipeline()
    for name in ("first", "second"):
        await pipeline.process(request(task_id=name, audio_duration=30))
    expected = [event.data.expected_s for event, _ in harness.events.published if isinstance(event, JobStarted)]
    assert expected[0] is None
    assert expected[1] is not None


@pytest.fixture
def routing(harness: Harness) -> Harness:
    harness.routes = TierForwarding(make_limits, BUILT_IN)  # a card of tier 6: 480 seconds, 8 songs
    return harness


LONG = {"audio_duration": 600}


async def test_a_request_over_the_tier_is_forwarded_and_acked_without_an_event(routing: Harness) -> None:
    delivery = request(**LONG)
    delivery.reachable = ("unlimited",)
    await routing.process(delivery)
    assert (delivery.forwarded, delivery.verdict) == (["unlimited"], Verdict.ACK)
    assert (routing.events.published, routing.renderer.rendered, routing.store.objects) == ([], [], {})
    assert not any(name.startswith("acestep_jobs_total") for name in samples_of(routing.stats.collect))


async def test_without_a_larger_tier_the_request_is_clamped(routing: Harness) -> None:
    delivery = await routing.process(request(**LONG))
    assert (delivery.forwarded, delivery.verdict) == ([], Verdict.ACK)
    event = routing.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert [change.applied for change in event.data.policy.adjustments] == [480]


async def test_a_forwarded_request_is_not_forwarded_again(routing: Harness) -> None:
    delivery = request(**LONG)
    delivery.reachable, delivery.tier = ("tier6", "unlimited"), "unlimited"
    await routing.process(delivery)
    assert (delivery.forwarded, routing.renderer.rendered) == ([], ["song"])


async def test_a_request_is_not_forwarded_to_a_tier_twice_whatever_tables_other_workers_have(routing: Harness) -> None:
    delivery = request(**LONG)
    delivery.reachable, delivery.visited_tiers = ("unlimited",), ("unlimited", "tier1")
    await routing.process(delivery)
    assert (delivery.forwarded, routing.renderer.rendered) == ([], ["song"])


async def test_an_ended_task_is_answered_and_not_forwarded(routing: Harness) -> None:
    await routing.process(request(**LONG))
    again = FakeDelivery(body=request(**LONG).body, redelivered=True, reachable=("unlimited",))
    await routing.process(again)
    assert (again.forwarded, routing.renderer.rendered) == ([], ["song"])


async def test_a_forward_without_a_confirm_requeues_the_message(routing: Harness) -> None:
    delivery = request(**LONG)

    async def unknown(_tier: str) -> bool:
        raise Unpublished("no confirm")

    delivery.forward = unknown  # type: ignore[method-assign, assignment]
    await routing.process(delivery)
    assert (delivery.verdict, routing.events.published, routing.store.objects) == (Verdict.REQUEUE, [], {})


async def test_the_songs_of_another_body_are_answered_with_a_warning(harness: Harness) -> None:
    await harness.process(request())
    await harness.process(request(prompt="rock"))
    first, second = (event for event, _ in harness.events.published if isinstance(event, JobCompleted))
    assert second.data.audios == first.data.audios
    assert (OTHER_BODY in first.data.warnings, OTHER_BODY in second.data.warnings) == (False, True)


async def test_a_completed_task_whose_audio_is_gone_is_rendered_again(harness: Harness) -> None:
    await harness.process(request())
    audio = next(address for address in harness.store.objects if address.key.endswith("0.wav"))
    del harness.store.objects[audio]
    await harness.process(FakeDelivery(body=request().body, redelivered=True))
    first, second = (event for event, _ in harness.events.published if isinstance(event, JobCompleted))
    assert harness.renderer.rendered == ["song", "song"]
    assert [audio.seed for audio in second.data.audios] == [audio.seed for audio in first.data.audios]
    assert AUDIO_DELETED in second.data.warnings


async def test_a_message_that_can_expire_is_not_kept_from_songs_by_the_end_of_an_earlier_one(harness: Harness) -> None:
    """Such an end is no sign of another worker: the message would go back to the queue until it expires."""
    await harness.process(request())
    del harness.store.objects[next(address for address in harness.store.objects if address.key.endswith("0.wav"))]
    again = await harness.process(FakeDelivery(body=request().body, expires=True))
    assert (harness.renderer.rendered, again.verdict) == (["song", "song"], Verdict.ACK)


async def test_a_failed_task_whose_message_can_expire_is_tried_again_when_it_is_published_again(
    harness: Harness,
) -> None:
    async def fail(_: Job) -> None:
        raise RenderFailed("no sound")

    harness.renderer.before = fail
    await harness.process(FakeDelivery(body=request().body, expires=True))
    del harness.renderer.before
    again = await harness.process(FakeDelivery(body=request().body, expires=True))
    assert ([harness.events.states[-1]], again.verdict) == (["completed"], Verdict.ACK)


@pytest.mark.parametrize("body", [b"garbage", b'{"task_id": "song", "task_type": "dance"}'])
async def test_a_message_that_is_rejected_leaves_the_manifest_of_a_task_whose_audio_is_gone(
    harness: Harness, body: bytes
) -> None:
    """Variations are made from it, and so is the song itself by the next message that can be read."""
    await harness.process(request())
    completed = await harness.store.find("song")
    del harness.store.objects[next(address for address in harness.store.objects if address.key.endswith("0.wav"))]
    rejected = await harness.process(FakeDelivery(body=body, message_id="song"))
    assert (harness.events.states[-1], rejected.verdict) == ("rejected", Verdict.DEAD_LETTER)
    assert await harness.store.find("song") == completed
    await harness.process(request())
    assert harness.events.states[-1] == "completed"


async def test_a_song_whose_audio_is_gone_and_that_fails_when_it_is_made_again_stays_completed(
    harness: Harness,
) -> None:
    await harness.process(request())
    completed = await harness.store.find("song")
    del harness.store.objects[next(address for address in harness.store.objects if address.key.endswith("0.wav"))]

    async def fail(_: Job) -> None:
        raise RenderFailed("no sound")

    harness.renderer.before = fail
    await harness.process(request())
    assert harness.events.states[-1] == "failed"
    assert await harness.store.find("song") == completed


async def test_songs_replace_an_end_without_songs_that_came_meanwhile(harness: Harness) -> None:
    """Another worker may have rejected a worse message with the same id while this one rendered."""

    async def reject(_: Job) -> None:
        await harness.store.commit(TerminalRecord(make_failure("song"), "another message"))

    harness.renderer.before = reject
    await harness.process(request())
    assert harness.events.states[-1] == "completed"
    record = await harness.store.find("song")
    assert record is not None
    assert isinstance(record.ending, Completed)


async def test_waiting_for_storage_is_not_running_time(tmp_path: Path) -> None:
    harness = Harness(tmp_path, timeout_s=1)
    put = harness.store.put

    async def slow(job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        await asyncio.sleep(1.2)
        return await put(job, rendering)

    harness.store.put = slow  # type: ignore[method-assign]
    await harness.process(request())
    assert harness.events.states[-1] == "completed"


async def test_the_attempt_records_of_a_redelivered_message_go_when_it_has_ended(harness: Harness) -> None:
    first = request()
    await harness.process(first)
    assert harness.attempts.forgotten == [], "the first delivery has none"
    for body in (first.body, request(task_id="other").body):  # one that had ended, and one that ends now
        await harness.process(FakeDelivery(body=body, redelivered=True))
    assert [task_id for task_id, _ in harness.attempts.forgotten] == ["song", "other"]


async def test_the_attempt_records_of_a_message_that_goes_back_stay(harness: Harness) -> None:
    async def interrupt(_: Job) -> None:
        raise Interrupted("the worker stops")

    harness.renderer.before = interrupt
    delivery = await harness.process(FakeDelivery(body=request().body, redelivered=True))
    assert delivery.verdict is Verdict.REQUEUE
    assert harness.attempts.forgotten == []


async def test_a_job_that_fails_after_its_channel_was_lost_has_not_ended(harness: Harness) -> None:
    """Another worker has the message and completes it: ``failed`` before its ``completed`` would be a second end."""
    lost, again = request(), request()

    async def fail(_: Job) -> None:
        lost.stale = True
        raise EngineCrashed("the engine died")

    harness.renderer.before = fail
    await harness.process(lost)
    assert "failed" not in harness.events.states
    assert harness.store.objects == {}
    harness.renderer.before, again.redelivered = None, True
    await harness.process(again)
    assert [state for state in harness.events.states if state in ("completed", "failed")] == ["completed"]


@pytest.mark.parametrize("known", [True, False], ids=["it knows that its channel is lost", "it does not"])
async def test_a_job_whose_expiration_is_told_while_its_attempt_is_recorded_does_not_begin(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """Another worker looked for the record of the attempt before it was there."""
    late = request()
    late.expires = True

    async def told(_: Attempt, *, expires: bool) -> None:
        assert expires
        late.stale = known
        if not known:
            info = RunInfo("another", 1, datetime(2026, 1, 1, tzinfo=UTC))
            ending = unfinished(Expired("it waited in the queue for longer than its expiration"), None, "song", info)
            await harness.store.commit(TerminalRecord(ending, late.fingerprint))

    monkeypatch.setattr(harness.attempts, "begin", told)
    await harness.process(late)
    assert harness.events.states == []
    assert harness.renderer.rendered == []
    assert [attempt.number for attempt in harness.attempts.excused] == [1]


async def test_a_cancelled_job_leaves_no_attempt_record(harness: Harness) -> None:
    """The cancellation excused its attempt, although the message was delivered once."""

    async def cancel(_: Job) -> None:
        await harness.cancellations.ask("song")
        await asyncio.Event().wait()

    harness.renderer.before = cancel
    delivery = await harness.process(request())
    assert [attempt.task_id for attempt in harness.attempts.excused] == ["song"]
    assert harness.attempts.forgotten == [("song", delivery.fingerprint)]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = st.sampled_from(sorted(field_names() - {"task_id"}))
OBJECTS = st.dictionaries(FIELD_NAMES | st.text(max_size=8), JSON_VALUES, max_size=6)
BODIES = (
    st.binary(max_size=80)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | OBJECTS.map(lambda fields: json.dumps({"task_id": "song", **fields}).encode())
    | OBJECTS.map(lambda fields: json.dumps({"input": {"prompt": "jazz", **fields}}).encode())
    | st.dictionaries(FIELD_NAMES, st.text(max_size=8), max_size=4).map(lambda fields: urlencode(fields).encode())
)
TYPES = st.none() | st.sampled_from(["application/json", "application/x-www-form-urlencoded", "application/msgpack"])


@settings(max_examples=60, deadline=None)
@given(body=BODIES, content_type=TYPES, message_id=st.sampled_from(["m-1", "no id ☃"]))
def test_whatever_a_message_holds_it_ends_once(body: bytes, content_type: str | None, message_id: str) -> None:
    with TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        delivery = FakeDelivery(body=body, message_id=message_id, body_format=BodyFormat(content_type=content_type))
        asyncio.run(harness.process(delivery))
    terminal = JobCompleted | JobFailed | JobRejected
    ends = [event.data for event, _ in harness.events.published if isinstance(event, terminal)]
    assert len(ends) == 1
    assert delivery.verdict in (Verdict.ACK, Verdict.DEAD_LETTER)
    if isinstance(ends[0], Unfinished):
        assert ends[0].error.code != "internal_error", ends[0].error.message
