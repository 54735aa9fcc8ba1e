# SPDX-License-Identifier: Apache-2.0
"""The story, on fakes: what is said, in which order, and what becomes of the delivery."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from consumer.engine.planner.direct import DirectPlanner
from consumer.errors import Cancelled, EngineCrashed, StorageUnavailable, Unpublished, Verdict
from consumer.job import Job
from consumer.pipeline import Pipeline, Ports, Rules
from schemas.events import JobCompleted, JobFailed, JobRejected, Unfinished
from tests.support.admission import make_limits
from tests.support.fake_engine import FakeRenderer, NoInputs
from tests.support.fake_store import FakeStore
from tests.support.fakes import FakeDelivery, FakeEvents


@dataclass
class Stage:
    """A pipeline on fakes, with everything in reach."""

    scratch: Path
    timeout_s: float | None = None
    store: FakeStore = field(default_factory=FakeStore)
    renderer: FakeRenderer = field(default_factory=FakeRenderer)
    events: FakeEvents = field(default_factory=FakeEvents)

    def pipeline(self) -> Pipeline:
        ports = Ports(
            store=self.store,
            inputs=NoInputs(),
            planner=DirectPlanner(),
            renderer=self.renderer,
            events=self.events,
        )
        rules = Rules(
            worker_id="worker-1",
            scratch=self.scratch,
            limits=make_limits,
            max_message_bytes=10_000,
            execution_timeout_s=self.timeout_s,
        )
        return Pipeline(ports, rules)

    async def process(self, delivery: FakeDelivery) -> FakeDelivery:
        await self.pipeline().process(delivery)
        return delivery

    def unfinished(self) -> Unfinished:
        event = self.events.published[-1][0]
        assert not isinstance(event, JobCompleted)
        assert isinstance(event.data, Unfinished)
        return event.data


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def request(**fields: object) -> FakeDelivery:
    return FakeDelivery(body=json.dumps({"task_id": "song", "prompt": "jazz", **fields}).encode())


async def test_a_request_is_started_sung_stored_told_and_acked(stage: Stage) -> None:
    delivery = await stage.process(request(batch_size=2, seed=7, audio_duration=30))
    assert (stage.events.states[0], stage.events.states[-1]) == ("started", "completed")
    assert delivery.verdict is Verdict.ACK
    event = stage.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert [audio.seed for audio in event.data.audios] == [7, 8]
    assert event.data.request.audio_duration == 30
    assert event.data.worker_id == "worker-1"
    assert event.data.timings.total is not None


async def test_the_event_comes_after_the_manifest_and_the_settlement_after_the_event(stage: Stage) -> None:
    order: list[str] = []
    delivery = request()
    commit, publish, settle = stage.store.commit, stage.events.publish, delivery.settle

    async def spy(name: str, call, *args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
        result = await call(*args)
        order.append(name)
        return result

    stage.store.commit = lambda manifest: spy("manifest", commit, manifest)  # type: ignore[method-assign]
    stage.events.publish = lambda event, reply: spy(str(event.state), publish, event, reply)  # type: ignore[method-assign]
    delivery.settle = lambda verdict, reason=None: spy("settled", settle, verdict, reason)  # type: ignore[method-assign]
    await stage.process(delivery)
    assert [step for step in order if step not in ("started", "progress")] == ["manifest", "completed", "settled"]
    assert order.index("started") < order.index("completed")


async def test_a_redelivery_that_finds_the_manifest_repeats_the_event_without_rendering(stage: Stage) -> None:
    await stage.process(request())
    first = stage.events.published[-1][0]
    again = await stage.process(FakeDelivery(body=request().body, attempt=2))
    assert stage.events.published[-1][0].to_json() == first.to_json()
    assert stage.renderer.rendered == ["song"]
    assert again.verdict is Verdict.ACK


async def test_two_deliveries_of_one_task_take_turns_and_render_once(stage: Stage) -> None:
    async def slowly(_: Job) -> None:
        await asyncio.sleep(0.01)

    stage.renderer.before = slowly
    pipeline = stage.pipeline()
    await asyncio.gather(*(pipeline.process(request()) for _ in range(5)))
    assert stage.renderer.rendered == ["song"]
    completed = [event for event, _ in stage.events.published if isinstance(event, JobCompleted)]
    assert len({event.to_json() for event in completed}) == 1
    assert len(completed) == 5


async def test_deliveries_of_different_tasks_run_side_by_side(stage: Stage) -> None:
    together = asyncio.Barrier(3)

    async def meet(_: Job) -> None:
        await together.wait()

    stage.renderer.before = meet
    pipeline = stage.pipeline()
    async with asyncio.timeout(10):
        await asyncio.gather(*(pipeline.process(request(task_id=f"song-{n}")) for n in range(3)))
    assert stage.renderer.most_at_once == 3


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"not json", "malformed_body"),
        (b'["a", "list"]', "malformed_body"),
        (b'{"task_id": "song", "audio_format": "midi"}', "invalid_request"),
        (b'{"task_id": "song", "prompt": "' + b"x" * 10_000 + b'"}', "message_too_large"),
        (b'{"task_id": "song", "audio_duration": 9000, "on_limit": "reject"}', "limit_exceeded"),
    ],
)
async def test_bad_input_is_rejected_with_a_reason_and_dead_lettered(stage: Stage, body: bytes, code: str) -> None:
    delivery = await stage.process(FakeDelivery(body=body, message_id="song"))
    assert isinstance(stage.events.published[-1][0], JobRejected)
    assert stage.unfinished().error.code == code
    assert stage.unfinished().task_id == "song"
    assert delivery.verdict is Verdict.DEAD_LETTER
    assert delivery.reason is not None
    assert stage.renderer.rendered == []


async def test_an_oversized_message_is_rejected_under_the_id_in_its_body(stage: Stage) -> None:
    body = b'{"task_id": "song", "prompt": "' + b"x" * 10_000 + b'"}'
    delivery = await stage.process(FakeDelivery(body=body))
    assert (stage.unfinished().task_id, stage.unfinished().error.code) == ("song", "message_too_large")
    assert delivery.verdict is Verdict.DEAD_LETTER


async def test_bad_input_without_any_id_is_dead_lettered_in_silence(stage: Stage) -> None:
    delivery = await stage.process(FakeDelivery(body=b"\xff\xfe"))
    assert stage.events.published == []
    assert delivery.verdict is Verdict.DEAD_LETTER


async def test_a_job_that_breaks_is_failed_and_dead_lettered_and_leaves_no_files(stage: Stage) -> None:
    async def crash(_: Job) -> None:
        raise EngineCrashed("the renderer process ended with exit code -9")

    stage.renderer.before = crash
    delivery = await stage.process(request())
    assert stage.events.states == ["started", "failed"]
    assert (stage.unfinished().error.code, stage.unfinished().error.retryable) == ("engine_crashed", True)
    assert delivery.verdict is Verdict.DEAD_LETTER
    assert list(stage.scratch.iterdir()) == []


async def test_a_bug_is_reported_without_its_text(stage: Stage) -> None:
    async def bug(_: Job) -> None:
        raise KeyError("/home/secret/path")

    stage.renderer.before = bug
    await stage.process(request())
    assert isinstance(stage.events.published[-1][0], JobFailed)
    assert stage.unfinished().error.code == "internal_error"
    assert "secret" not in stage.unfinished().model_dump_json()


async def test_a_cancelled_job_is_told_as_cancelled_and_acked(stage: Stage) -> None:
    async def cancel(_: Job) -> None:
        raise Cancelled

    stage.renderer.before = cancel
    delivery = await stage.process(request())
    assert stage.events.states[-1] == "cancelled"
    assert delivery.verdict is Verdict.ACK


async def test_a_cancelled_coroutine_settles_and_says_nothing(stage: Stage) -> None:
    began = asyncio.Event()

    async def forever(_: Job) -> None:
        began.set()
        await asyncio.Event().wait()

    stage.renderer.before = forever
    delivery = request()
    task = asyncio.create_task(stage.process(delivery))
    await began.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert not delivery.settled
    assert "failed" not in stage.events.states
    assert list(stage.scratch.iterdir()) == []


async def test_an_event_that_cannot_be_confirmed_leaves_the_delivery_unsettled(stage: Stage) -> None:
    stage.events.down = True
    delivery = request()
    with pytest.raises(Unpublished):
        await stage.process(delivery)
    assert not delivery.settled


async def test_storage_that_is_gone_fails_the_job_with_its_own_code(stage: Stage) -> None:
    async def gone(_: str) -> None:
        raise StorageUnavailable("s3://acestep: gave up")

    stage.store.find = gone  # type: ignore[method-assign, assignment]
    await stage.process(request())
    assert stage.unfinished().error.code == "storage_unavailable"


async def test_a_job_over_the_execution_timeout_is_stopped(tmp_path: Path) -> None:
    stage = Stage(tmp_path, timeout_s=0.05)

    async def forever(_: Job) -> None:
        await asyncio.Event().wait()

    stage.renderer.before = forever
    await stage.process(request())
    assert stage.unfinished().error.code == "execution_timeout"


async def test_the_terminal_event_answers_the_requester_under_its_correlation_id(stage: Stage) -> None:
    delivery = request()
    delivery.reply = type(delivery.reply)(reply_to="answers", correlation_id="c-1")
    await stage.process(delivery)
    (queue, event) = stage.events.answers[0]
    assert (queue, str(event.state), len(stage.events.answers)) == ("answers", "completed", 1)
    assert {reply.correlation_id for _, reply in stage.events.published} == {"c-1"}


async def test_unknown_fields_become_warnings_in_the_event(stage: Stage) -> None:
    await stage.process(request(mood="blue"))
    event = stage.events.published[-1][0]
    assert isinstance(event, JobCompleted)
    assert any("mood" in warning for warning in event.data.warnings)
