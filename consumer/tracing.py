# SPDX-License-Identifier: Apache-2.0
"""Distributed tracing with OpenTelemetry, where it is installed and asked for; else the producer's trace is passed on.

A message's header ``traceparent`` (W3C Trace Context) makes its job a part of the producer's trace: a span for the job,
one for each stage. Names follow OpenTelemetry's conventions for messaging. Exporters are set by OpenTelemetry's own
variables, ``OTEL_EXPORTER_OTLP_ENDPOINT`` above all; without one of them nothing is recorded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from consumer.case import Case

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # the extra `otel`
    INSTALLED = False
else:
    INSTALLED = True

TRACE_ID: Final = slice(3, 35)
"""Where the trace's id stands in a ``traceparent``."""

_NAME: Final = "acestep-consumer"
_QUEUE: Final = "acestep.generate"
_ASKED: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")

log = structlog.get_logger()


def set_up_tracing(worker_id: str) -> None:
    """Record spans and send them where the environment says, if it says so."""
    if not any(os.environ.get(name, "none") != "none" for name in _ASKED):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - as above
    except ImportError as error:
        log.warning("no tracing", missing=error.name, fix="pip install 'acestep-consumer[otel]'")
        return
    provider = TracerProvider(resource=Resource.create({"service.name": _NAME, "service.instance.id": worker_id}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


@contextmanager
def job_span(case: Case) -> Iterator[None]:
    """Make the body the span of a job, and leave its ``traceparent`` in ``case``."""
    case.traceparent = case.delivery.traceparent
    if not INSTALLED:
        with structlog.contextvars.bound_contextvars(**_ids(case)):
            yield
        return
    parent = TraceContextTextMapPropagator().extract({"traceparent": case.traceparent or ""})
    attributes: dict[str, str | int] = {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": _QUEUE,
        "messaging.message.id": case.task_id or "",
        "messaging.message.body.size": len(case.delivery.body),
    }
    span = trace.get_tracer(_NAME).start_as_current_span(
        f"process {_QUEUE}", context=parent, kind=trace.SpanKind.CONSUMER, attributes=attributes
    )
    with span as current:
        carrier: dict[str, str] = {}
        if current.is_recording():
            TraceContextTextMapPropagator().inject(carrier)
        case.traceparent = carrier.get("traceparent", case.traceparent)
        with structlog.contextvars.bound_contextvars(**_ids(case)):
            yield


@contextmanager
def stage_span(stage: str) -> Iterator[None]:
    """Make the body a span within the job's."""
    if not INSTALLED:
        yield
        return
    with trace.get_tracer(_NAME).start_as_current_span(stage):
        yield


def _ids(case: Case) -> dict[str, str | None]:
    ids = {"task_id": case.task_id}
    return ids if case.traceparent is None else {**ids, "trace_id": case.traceparent[TRACE_ID]}
