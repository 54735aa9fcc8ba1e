# SPDX-License-Identifier: Apache-2.0
"""A job is a part of its producer's trace: one span, a child for each stage, and the ids where people look for them."""

from collections.abc import Iterator

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from consumer import tracing
from consumer.case import Case
from consumer.tracing import job_span, stage_span
from tests.support.fakes import FakeDelivery

TRACE_ID, PARENT_ID = "a" * 32, "b" * 16
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is recorded, by a provider of this test's own."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def case(traceparent: str | None = TRACEPARENT) -> Case:
    return Case.of(FakeDelivery(body=b'{"task_id": "song"}', traceparent=traceparent), 1_000)


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
    with job_span(case()):
        pass
    (whole,) = spans.get_finished_spans()
    assert whole.attributes is not None
    assert dict(whole.attributes) == {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "acestep.generate",
        "messaging.message.id": "song",
        "messaging.message.body.size": 19,
    }


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
