# SPDX-License-Identifier: Apache-2.0
"""A job is a part of its producer's trace: one span, a child for each stage, and the ids where people look for them."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from acestep_consumer.broker.topology import tier_queue
from acestep_consumer.domain.errors import LmUnavailable
from acestep_consumer.domain.parse import RequestRules
from acestep_consumer.domain.ports import Reply
from acestep_consumer.execution.context import JobContext
from acestep_consumer.observability import tracing
from acestep_consumer.observability.tracing import (
    http_request_span,
    job_span,
    note_end,
    note_http_status,
    publish_span,
    stage_span,
)
from acestep_schemas.events import ErrorCode, ErrorReport, Unfinished
from tests.support.fakes import FakeDelivery

TRACE_ID, PARENT_ID = "a" * 32, "b" * 16
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is recorded, by a provider of this test's own."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def case(traceparent: str | None = TRACEPARENT, **properties: Any) -> JobContext:
    return JobContext.of(
        FakeDelivery(body=b'{"task_id": "song"}', traceparent=traceparent, **properties), RequestRules(max_bytes=1_000)
    )


def ending(status: Literal["failed", "cancelled"], code: ErrorCode) -> Unfinished:
    return Unfinished(
        task_id="song",
        status=status,
        attempt=1,
        worker_id="worker-1",
        finished_at=datetime.now(UTC),
        error=ErrorReport(code=code, message="no room", retryable=False, attempts=1),
    )


def test_the_job_is_a_child_of_the_producers_span_and_the_stages_are_children_of_the_job(
    spans: InMemorySpanExporter,
) -> None:
    job = case()
    with job_span(job), stage_span("render"):
        pass
    stage, whole = spans.get_finished_spans()
    assert (stage.name, whole.name, whole.kind) == ("render", "process acestep.generate", trace.SpanKind.CONSUMER)
    assert whole.parent is not None
    assert stage.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT_ID
    assert stage.parent.span_id == whole.context.span_id
    assert job.traceparent == f"00-{TRACE_ID}-{whole.context.span_id:016x}-01"


def test_the_span_says_what_the_conventions_for_messaging_ask_for(spans: InMemorySpanExporter) -> None:
    with job_span(case(message_id="m-1", reply=Reply(reply_to=None, correlation_id="c-1"))):
        pass
    assert only(spans).attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "acestep.generate",
        "messaging.message.id": "m-1",
        "messaging.message.conversation_id": "c-1",
        "messaging.message.body.size": 19,
        "acestep.task_id": "song",
    }


def test_a_job_that_was_sent_on_comes_from_its_tiers_queue(spans: InMemorySpanExporter) -> None:
    with job_span(case(tier="tier6")):
        pass
    whole = only(spans)
    assert whole.attributes is not None
    assert whole.name == f"process {tier_queue('tier6')}"
    assert whole.attributes["messaging.destination.name"] == tier_queue("tier6")


def test_what_a_message_does_not_have_is_left_out(spans: InMemorySpanExporter) -> None:
    with job_span(JobContext.of(FakeDelivery(body=b"no JSON"), RequestRules(max_bytes=1_000))):
        pass
    assert only(spans).attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "acestep.generate",
        "messaging.message.body.size": 7,
    }


def test_a_failed_job_has_its_code_and_its_message_on_its_span(spans: InMemorySpanExporter) -> None:
    with job_span(case()):
        note_end(ending("failed", ErrorCode.RESOURCE_EXHAUSTED))
    whole = only(spans)
    assert whole.attributes is not None
    assert whole.attributes["error.type"] == "resource_exhausted"
    assert whole.attributes["acestep.state"] == "failed"
    assert (whole.status.status_code, whole.status.description) == (trace.StatusCode.ERROR, "no room")


def test_a_cancelled_job_did_not_fail(spans: InMemorySpanExporter) -> None:
    with job_span(case()):
        note_end(ending("cancelled", ErrorCode.CANCELLED))
    whole = only(spans)
    assert whole.attributes is not None
    assert whole.attributes["acestep.state"] == "cancelled"
    assert "error.type" not in whole.attributes
    assert whole.status.status_code is trace.StatusCode.UNSET


@pytest.mark.parametrize(("error", "kind"), [(LmUnavailable("x"), "lm_unavailable"), (KeyError("x"), "KeyError")])
def test_a_stage_that_fails_says_of_what(spans: InMemorySpanExporter, error: Exception, kind: str) -> None:
    with job_span(case()), pytest.raises(type(error)), stage_span("plan"):
        raise error
    stage, whole = spans.get_finished_spans()
    assert stage.attributes == {"error.type": kind}
    assert stage.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in stage.events] == ["exception"]
    assert whole.status.status_code is trace.StatusCode.UNSET


def test_an_error_that_leaves_the_job_is_on_its_span(spans: InMemorySpanExporter) -> None:
    with pytest.raises(TimeoutError), job_span(case()):
        raise TimeoutError
    whole = only(spans)
    assert whole.attributes is not None
    assert whole.attributes["error.type"] == "TimeoutError"
    assert whole.status.status_code is trace.StatusCode.ERROR


def test_a_producer_that_does_not_record_is_followed(spans: InMemorySpanExporter) -> None:
    job = case(f"{TRACEPARENT[:-2]}00")
    with job_span(job), stage_span("render"):
        pass
    assert spans.get_finished_spans() == ()
    assert job.traceparent == f"{TRACEPARENT[:-2]}00"


def test_ids_of_zeros_are_no_trace(spans: InMemorySpanExporter) -> None:
    with job_span(case(f"00-{'0' * 32}-{'0' * 16}-01")):
        pass
    whole = only(spans)
    assert whole.parent is None
    assert whole.context.trace_id


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def test_a_job_without_a_producers_trace_begins_one(spans: InMemorySpanExporter) -> None:
    job = case(None)
    with job_span(job):
        pass
    (whole,) = spans.get_finished_spans()
    assert job.traceparent is not None
    assert job.traceparent.startswith(f"00-{whole.context.trace_id:032x}-{whole.context.span_id:016x}-")


def test_without_a_recorder_the_producers_trace_is_passed_on() -> None:
    job = case()
    with job_span(job), stage_span("render"):
        assert structlog.contextvars.get_contextvars() == {"task_id": "song", "trace_id": TRACE_ID}
    assert job.traceparent == TRACEPARENT


def test_without_the_package_the_producers_trace_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "INSTALLED", False)
    job = case()
    with job_span(job), stage_span("render"):
        assert structlog.contextvars.get_contextvars() == {"task_id": "song", "trace_id": TRACE_ID}
    assert job.traceparent == TRACEPARENT


def test_nothing_is_set_up_where_the_environment_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    before = trace.get_tracer_provider()
    tracing.set_up_tracing("worker-1")
    assert trace.get_tracer_provider() is before


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER", "always_off "),
        ("OTEL_TRACES_SAMPLER_ARG", "nan"),
        ("OTEL_TRACES_SAMPLER_ARG", "10%"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "nan"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4318"),
    ],
)
def test_a_variable_that_cannot_be_followed_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv(variable, value)
    before = trace.get_tracer_provider()

    with pytest.raises(tracing.TracingMisconfigured, match=f"{variable}={value}: must be "):
        tracing.set_up_tracing("worker-1")

    assert trace.get_tracer_provider() is before


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_SAMPLER": "always_on", "OTEL_TRACES_SAMPLER_ARG": "endpoint=x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "HTTP://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
    ],
)
def test_a_variable_that_is_not_read_is_not_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert list(tracing._broken_rules()) == []


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_EXPORTER": "None", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_no_exporter_and_an_empty_endpoint_mean_no_tracing(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = trace.get_tracer_provider()
    tracing.set_up_tracing("worker-1")
    assert trace.get_tracer_provider() is before


def test_a_request_to_the_rest_api_is_the_parent_of_its_publish_whose_context_goes_into_the_message(
    spans: InMemorySpanExporter,
) -> None:
    with http_request_span("POST", "/release_task", TRACEPARENT):
        with publish_span("song", TRACEPARENT) as forwarded:
            pass
        note_http_status(503)
    publish, request = spans.get_finished_spans()
    assert (publish.kind, request.kind) == (trace.SpanKind.PRODUCER, trace.SpanKind.SERVER)
    assert request.parent is not None
    assert publish.parent is not None
    assert (f"{request.parent.span_id:016x}", publish.parent.span_id) == (PARENT_ID, request.context.span_id)
    assert forwarded == f"00-{TRACE_ID}-{publish.context.span_id:016x}-01"
    assert request.name == "POST /release_task"
    assert dict(request.attributes or {})["http.response.status_code"] == 503
    assert request.status.status_code == trace.StatusCode.ERROR
    assert dict(publish.attributes or {})["messaging.destination.name"] == "acestep.requests"


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_recorder_the_clients_context_is_forwarded(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:  # noqa: FBT001 - a parameter of a test
    monkeypatch.setattr(tracing, "INSTALLED", installed)
    with http_request_span("POST", "/release_task", TRACEPARENT), publish_span("song", TRACEPARENT) as forwarded:
        note_http_status(200)
    assert forwarded == TRACEPARENT
