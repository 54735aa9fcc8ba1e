# SPDX-License-Identifier: Apache-2.0
"""What ``status`` concludes from what it sees, and how it is shown."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from acestep_consumer.broker.inspection import QueueDepth
from acestep_consumer.broker.management import ConsumerInfo, RequestQueue, _request_queue
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, UNROUTED, tier_queue
from acestep_consumer.client.estimate import WorkerLoad
from acestep_consumer.commands.status.report import (
    ObservedEvents,
    PacePart,
    StatusInputs,
    StatusReport,
    TierQueuePart,
    backlog,
    status_of,
)
from acestep_consumer.commands.status.table import table
from acestep_schemas.events import JobCompleted, StageJobs, StageLimitsReport, Worker, WorkerEvent
from tests.support.broker import failed_event
from tests.support.jobs import make_job, make_manifest


def completed(total_s: float) -> JobCompleted:
    manifest = make_manifest(make_job())
    return JobCompleted.of(
        manifest.model_copy(update={"timings": manifest.timings.model_copy(update={"total": total_s})})
    )


def announced(
    worker_id: str, *, prefetch: int = 4, state: Any = "ready", in_hand: int = 0, **fields: Any
) -> WorkerEvent:
    data = Worker(
        worker_id=worker_id,
        state=state,
        prefetch=prefetch,
        in_hand=in_hand,
        models=("m",),
        tier="tier6",
        vram_gb=24,
        **fields,
    )
    return WorkerEvent.of(data)


def of_tier(tier: str, state: Any) -> Worker:
    return Worker(worker_id="of-tier", state=state, prefetch=1, in_hand=0, models=("m",), tier=tier, vram_gb=80)


def monitored(
    *consumers: tuple[str, int] | tuple[str, int, int], unacked: int = 6, acked_per_s: float | None = 0.5
) -> RequestQueue:
    return RequestQueue(
        ready=0,
        unacked=unacked,
        acked_per_s=acked_per_s,
        limit=150,
        consumers=tuple(
            ConsumerInfo(worker_id=name, prefetch=prefetch, consumers=sum(several) or 1)
            for name, prefetch, *several in consumers
        ),
    )


def status(
    ready: int = 0, consumers: int = 0, *, heard: ObservedEvents | None = None, monitor: RequestQueue | None = None
) -> StatusReport:
    depths = {GENERATE: QueueDepth(ready, consumers), DEAD_LETTER: QueueDepth(2, 0), UNROUTED: None}
    seen = StatusInputs(
        broker="amqp://host/",
        version="3.10.8",
        limit=200,
        depths=depths,
        monitored=monitor,
        observed=heard or ObservedEvents(0.0),
        now_s=60.0,
    )
    return status_of(seen)


def routed(
    sent_on: dict[str, int], heard: ObservedEvents, asked_s: float | None, monitor: RequestQueue | None = None
) -> StatusReport:
    """With requests that wait for larger cards; workers were first asked at ``asked_s``, and it is 60 s."""
    depths: dict[str, QueueDepth | None] = {tier_queue(tier): QueueDepth(ready, 0) for tier, ready in sent_on.items()}
    seen = StatusInputs(
        broker="amqp://host/",
        version="3.10.8",
        limit=200,
        depths=depths | {GENERATE: QueueDepth(0, 1), DEAD_LETTER: None, UNROUTED: None},
        tiers=("tier1", "tier6", "unlimited"),
        asked_s=asked_s,
        monitored=monitor,
        observed=heard,
        now_s=60.0,
    )
    return status_of(seen)


def shown(answer: StatusReport, width: int = 200) -> str:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False).print(table(answer))
    return text.getvalue()


def test_the_bound_is_the_limit_and_the_prefetch_of_all_workers() -> None:
    found = status(10, 3, monitor=monitored(("a", 4, 2), ("b", 8)))
    assert (found.queue.limit, found.queue.limit_from, found.queue.bound) == (150, "broker", 162)
    assert found.queue.unacked == 6
    assert [(each.worker_id, each.prefetch) for each in found.workers] == [("a", 4), ("b", 8)]


def test_the_bound_is_not_known_until_the_management_api_lists_every_consumer() -> None:
    assert status(0, 3, monitor=monitored(("a", 4), ("b", 8))).queue.bound is None


def test_without_the_management_api_the_bound_is_known_when_every_consumer_was_heard() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a"), 51)
    heard.add(announced("b", prefetch=2), 52)
    assert status(0, 2, heard=heard).queue.bound == 206
    assert status(0, 3, heard=heard).queue.bound is None
    assert status(0, 1).queue.bound is None
    assert status(0, 0).queue.bound == 200


def test_without_the_management_api_the_workers_say_how_many_jobs_they_run() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", in_hand=3), 51)
    heard.add(announced("b", in_hand=1), 52)
    heard.add(announced("c", in_hand=2, state="draining"), 53)
    found = status(0, 2, heard=heard)
    assert (found.queue.unacked, found.queue.unacked_from) == (6, "workers")
    assert [(each.worker_id, each.in_hand) for each in found.workers] == [("a", 3), ("b", 1), ("c", 2)]
    assert "6 (reported by workers)" in shown(found)


def test_jobs_are_shown_by_the_stage_that_they_are_in() -> None:
    heard = ObservedEvents(0.0)
    limits = StageLimitsReport(plan=64, upload=16)
    heard.add(announced("a", in_hand=3, stages=StageJobs(plan=2, render=1), stage_limits=limits), 51)
    heard.add(announced("of-before"), 52)
    found = status(0, 2, heard=heard)
    assert [each.stages and each.stages["plan"] for each in found.workers] == [2, None]
    text = shown(found)
    assert "plan 2 of 64" in text
    assert "render 1" in text
    assert "upload" not in text


def test_in_hand_is_at_least_what_those_say_that_answered() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", in_hand=3), 51)
    found = status(0, 2, heard=heard)
    assert (found.queue.unacked, found.queue.unacked_from) == (None, None)
    assert "at least 3 (reported by 1 worker of 2 consumers)" in shown(found)


def test_the_brokers_count_goes_before_the_workers_own() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", in_hand=3), 51)
    found = status(0, 1, heard=heard, monitor=monitored(("a", 4), unacked=5))
    assert (found.queue.unacked, found.queue.unacked_from) == (5, "broker")
    assert "(reported by workers)" not in shown(found)


def test_a_worker_says_how_many_jobs_it_runs_by_the_latest_and_one_that_fell_silent_is_gone() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", in_hand=3), 40)
    heard.add(announced("b", in_hand=3), 40)
    heard.add(announced("a", in_hand=1), 59)
    found = status(0, 1, heard=heard)
    assert (found.queue.unacked, [each.worker_id for each in found.workers]) == (1, ["a"])


def test_a_worker_that_stopped_is_not_counted() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a"), 51)
    heard.add(announced("a", state="stopped"), 52)
    assert status(0, 0, heard=heard).workers == ()


def test_what_a_worker_said_of_itself_goes_with_the_brokers_count() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", prefetch=2), 51)
    (worker,) = status(0, 1, heard=heard, monitor=monitored(("a", 8))).workers
    assert (worker.prefetch, worker.tier, worker.models) == (8, "tier6", ("m",))


def test_the_backlog_is_its_jobs_over_all_slots() -> None:
    heard = ObservedEvents(0.0)
    for at in (10, 20, 30):
        heard.add(completed(40), at)
    found = status(20, 1, heard=heard, monitor=monitored(("a", 4), acked_per_s=None))
    assert found.pace.job_s == 40
    assert found.pace.jobs_a_minute == 3
    # Five jobs one after the other in each of four slots, after running ones of which the last is nearly new.
    assert found.eta_s == 5 * 40 + 3.5 / 4 * 40
    assert found.eta_most_s == 60 * 20 / 3
    assert "about 4 to 7 min" in shown(found)


def test_running_jobs_count_with_their_age_and_length() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", prefetch=2, in_hand=2, seconds_per_job=6.8, remaining_s=(200.0, 300.0)), 59)
    found = status(4, 1, heard=heard)
    # All four begin in the slot that is free after 200 s.
    assert found.eta_s == 228
    assert "about 4 min" in shown(found)


def test_nothing_moves_and_the_running_job_is_older_than_any_so_the_backlog_is_unknown() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", prefetch=1, in_hand=1, seconds_per_job=6.8, remaining_s=(None,)), 59)
    found = status(4, 1, heard=heard)
    assert (found.eta_s, found.eta_most_s) == (None, None)
    assert "backlog          unknown" in shown(found)


def test_a_backlog_is_never_shown_more_precisely_than_it_is_known() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", prefetch=1, in_hand=0, seconds_per_job=6.8), 59)
    found = status(1, 1, heard=heard)
    assert found.eta_s == 7
    assert "backlog          a few seconds" in shown(found)


def test_the_rate_stands_in_where_the_seconds_of_a_job_are_not_known() -> None:
    found = status(20, 1, monitor=monitored(("a", 4), acked_per_s=0.5))
    assert (found.pace.jobs_a_minute, found.pace.source) == (30, "broker")
    assert found.eta_s == 40


def test_what_is_not_known_is_not_guessed() -> None:
    found = status(20, 1)
    assert (found.eta_s, found.pace.jobs_a_minute, found.queue.unacked) == (None, None, None)


@pytest.mark.parametrize("prefetch", [None, 0, 4])
def test_an_empty_queue_is_empty_now(prefetch: int | None) -> None:
    loads = None if prefetch is None else [WorkerLoad(prefetch=prefetch, in_hand=0)]
    assert backlog(0, PacePart(jobs_a_minute=None, job_s=None, source=None, heard_s=0), loads) == (0, None)


def test_jobs_that_end_otherwise_count_but_say_nothing_of_their_length() -> None:
    heard = ObservedEvents(0.0)
    heard.add(failed_event("t"), 30)
    pace = heard.pace(60)
    assert (pace.jobs_a_minute, pace.job_s) == (1, None)


def test_what_was_heard_long_ago_is_forgotten() -> None:
    heard = ObservedEvents(0.0)
    heard.add(completed(5), 10)
    heard.add(completed(5), 1_000)
    pace = heard.pace(1_020)
    assert (pace.jobs_a_minute, pace.heard_s) == (0.2, 300)


def test_requests_that_wait_for_larger_cards_are_told_by_tier() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a"), 59)
    found = routed({"tier6": 1_200}, heard, asked_s=50)
    assert found.tiers == (TierQueuePart(tier="tier6", ready=1_200),)
    assert found.notes == ()
    assert found.queue.ready == 0
    assert "forwarded        1,200 waiting for tier6" in shown(found)
    assert "200 more for each tier" in shown(found)
    assert "forwarded        none waiting" in shown(routed({"tier6": 0}, heard, asked_s=50))


def test_where_requests_are_sent_on_the_workers_own_words_go_before_the_figures_of_one_queue() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("a", prefetch=4, in_hand=3), 59)
    found = routed({}, heard, 50, monitored(("a", 1), unacked=1, acked_per_s=9))
    assert (found.queue.limit, found.queue.limit_from) == (150, "broker")
    assert (found.queue.unacked, found.queue.unacked_from, found.queue.bound) == (3, "workers", 154)
    assert [(each.worker_id, each.prefetch) for each in found.workers] == [("a", 4)]
    assert found.pace.jobs_a_minute is None


def test_where_nothing_is_sent_on_nothing_is_said_of_it() -> None:
    assert status().tiers is None
    assert "forwarded" not in shown(status())


def test_requests_that_wait_for_a_tier_of_which_nobody_answered_are_a_warning() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("small"), 59)
    heard.add(WorkerEvent.of(of_tier("unlimited", "draining")), 59)
    (note,) = routed({"tier6": 2, "unlimited": 3}, heard, asked_s=50).notes
    assert note.startswith("3 waiting in acestep.generate.unlimited, and no worker of unlimited answered")


@pytest.mark.parametrize("asked_s", [None, 59.0])
def test_workers_that_were_not_asked_or_only_just_are_not_missed(asked_s: float | None) -> None:
    assert routed({"unlimited": 3}, ObservedEvents(0.0), asked_s).notes == ()


def test_a_worker_that_answers_is_there_also_without_a_consumer() -> None:
    """With a prefetch of 1 and a job from another queue, it has none on the request queue."""
    heard = ObservedEvents(0.0)
    heard.add(WorkerEvent.of(of_tier("unlimited", "ready")), 59)
    text = shown(status(3, 0, heard=heard))
    assert "1 responding, none takes requests now: busy, or paused" in text


def test_the_picture_says_what_a_person_needs() -> None:
    text = shown(status(200, 0, monitor=monitored()))
    assert "200 of 150; full, further requests are rejected" in text
    assert "none: no requests are taken" in text
    assert "2; see acestep-consumer dead list" in text
    text = shown(status(10, 1, monitor=monitored(("w1", 4))))
    assert "154 = queue limit 150 (from the broker) + prefetch 4" in text
    assert "30 jobs per minute in the last minutes" in text
    assert "about 20 s" in text
    assert "w1" in text


def test_the_json_is_one_object_that_can_be_read_back() -> None:
    answer = status(3, 1, monitor=monitored(("w1", 4)))
    assert StatusReport.model_validate_json(answer.model_dump_json()) == answer
    assert json.loads(answer.model_dump_json())["queue"]["ready"] == 3


def detail(connection: str, prefetch: int) -> dict[str, Any]:
    return {"prefetch_count": prefetch, "channel_details": {"connection_name": connection}}


def test_the_management_apis_answer_is_read_as_workers_and_limits() -> None:
    queue = {
        "messages_ready": 5,
        "messages_unacknowledged": 3,
        "arguments": {"x-max-length": 300},
        "effective_policy_definition": {"max-length": 100},
        "message_stats": {"ack_details": {"rate": 0.0, "avg_rate": 0.25}},
        "consumer_details": [detail("c1", 2), detail("c2", 8), detail("c1", 3), detail("c3", 1)],
    }
    names = {"c1": "acestep-consumer gpu-1 consume", "c2": "acestep-consumer gpu-0 consume", "c3": ""}
    found = _request_queue(queue, names)
    assert (found.ready, found.unacked, found.limit, found.acked_per_s) == (5, 3, 100, 0.25)
    assert [(each.worker_id, each.prefetch) for each in found.consumers] == [("c3", 1), ("gpu-0", 8), ("gpu-1", 5)]


def test_a_queue_that_the_api_knows_little_of_yet_is_read_too() -> None:
    found = _request_queue({"arguments": {}, "effective_policy_definition": None}, {})
    assert found == RequestQueue(ready=0, unacked=0, acked_per_s=None, limit=None, consumers=())


def test_at_80_columns_no_name_is_broken_and_notes_have_a_hanging_indent() -> None:
    heard = ObservedEvents(0.0)
    heard.add(announced("render-1-gpu0"), 59)
    found = status(3, 1, heard=heard).model_copy(
        update={"notes": ("one note that is longer than eighty columns " * 3,)}
    )
    models = ("acestep-v15-xl-turbo", "acestep-v15-base", "acestep-v15-sft")
    worker = found.workers[0].model_copy(update={"models": models, "tier": "unlimited", "state": "draining"})
    text = shown(found.model_copy(update={"workers": (worker,)}), width=80)
    assert all(name in text for name in (*models, "render-1-gpu0", "unlimited", "draining"))
    _, *others = text[text.index("- one note") :].splitlines()
    assert others
    assert all(line.startswith("  ") for line in others)


def test_unrouted_events_are_said_to_be_harmless() -> None:
    found = status()
    assert "harmless" not in shown(found)
    assert "19, kept; harmless: no subscriber was connected" in shown(found.model_copy(update={"unrouted_events": 19}))
