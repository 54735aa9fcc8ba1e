# SPDX-License-Identifier: Apache-2.0
"""Distributed tracing with OpenTelemetry, where it is installed and asked for; else the producer's trace is passed on.

A message's header ``traceparent`` (W3C Trace Context) makes its job a part of the producer's trace: a span for the job,
one for each stage. Names follow OpenTelemetry's conventions for messaging; where those leave a choice, the producer's
context is the parent of the job's span, not a link: a job is one message, and nothing else is its cause.

Exporters are set by OpenTelemetry's own variables, ``OTEL_EXPORTER_OTLP_ENDPOINT`` above all; without one of them
nothing is recorded.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.job import Rendering
from acestep_consumer.domain.outcome import Ending
from acestep_consumer.execution.context import JobContext
from acestep_schemas.events import Completed, Timings

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
except ImportError:  # the extra `otel`
    INSTALLED = False
else:
    INSTALLED = True

TRACE_ID: Final = slice(3, 35)
"""Where the trace's id stands in a ``traceparent``."""

_PARENT_ID, _FLAGS = slice(36, 52), slice(53, 55)
_NAME: Final = "acestep-consumer"
_QUEUE: Final = "acestep.generate"
_OF_EVERY_JOB: Final[dict[str, str | int]] = {
    "messaging.system": "rabbitmq",
    "messaging.operation.type": "process",
    "messaging.operation.name": "process",
}
_ASKED: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")

log = structlog.get_logger()

if INSTALLED:
    # Once: looking one up takes longer than a span. This one finds the provider, whenever it is set.
    tracer: trace.Tracer = trace.get_tracer(_NAME)


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
def job_span(case: JobContext) -> Iterator[None]:
    """Make the body the span of a job, and leave its ``traceparent`` in ``case``."""
    case.traceparent = case.delivery.traceparent
    if not INSTALLED:
        with structlog.contextvars.bound_contextvars(**_ids(case)):
            yield
        return
    queue = _QUEUE if case.delivery.tier is None else f"{_QUEUE}.{case.delivery.tier}"
    span = tracer.start_span(
        f"process {queue}",
        _context_of(case.traceparent),
        kind=trace.SpanKind.CONSUMER,
        attributes=_attributes(case, queue),
    )
    if span.is_recording():
        case.traceparent = _written(span.get_span_context())
    with structlog.contextvars.bound_contextvars(**_ids(case)), trace.use_span(span, end_on_exit=True):
        try:
            yield
        except Exception as error:
            span.set_attribute("error.type", _type_of(error))
            raise


@contextmanager
def stage_span(stage: str) -> Iterator[None]:
    """Make the body a span within the job's."""
    if not INSTALLED or not trace.get_current_span().is_recording():
        yield
        return
    span = tracer.start_span(stage)
    with trace.use_span(span, end_on_exit=True):
        try:
            yield
        except Exception as error:
            span.set_attribute("error.type", _type_of(error))
            raise


def note_end(ending: Ending) -> None:
    """Write on the job's span how the job ended, unless it is done. A cancelled one did not fail.

    ``error.type`` is one of ``acestep_schemas.events.ErrorCode``.
    """
    if not INSTALLED or isinstance(ending, Completed):
        return
    span = trace.get_current_span()
    span.set_attribute("acestep.state", ending.status)
    if ending.status != "cancelled":
        span.set_attribute("error.type", ending.error.code.value)
        span.set_status(trace.StatusCode.ERROR, ending.error.message)


def _type_of(error: Exception) -> str:
    """Return a word of which there are few: one of ``acestep_schemas.events.ErrorCode``, or an exception's name."""
    return error.code.value if isinstance(error, ConsumerError) else type(error).__name__


def _context_of(traceparent: str | None) -> "Context":
    """Return the context that the producer sent: well formed, as a delivery's is. Empty without one."""
    if traceparent is None:
        return Context()
    sent = trace.SpanContext(
        int(traceparent[TRACE_ID], 16),
        int(traceparent[_PARENT_ID], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(traceparent[_FLAGS], 16)),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(sent), Context())


def _written(of: "trace.SpanContext") -> str:
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"


def _attributes(case: JobContext, queue: str) -> dict[str, str | int]:
    """What messages and jobs have. The queue is the destination: routing keys are as many as producers like."""
    delivery = case.delivery
    attributes = {
        **_OF_EVERY_JOB,
        "messaging.destination.name": queue,
        "messaging.message.body.size": len(delivery.body),
    }
    if delivery.message_id is not None:
        attributes["messaging.message.id"] = delivery.message_id
    if (conversation := delivery.reply.correlation_id) is not None:
        attributes["messaging.message.conversation_id"] = conversation
    if case.task_id is not None:
        attributes["acestep.task_id"] = case.task_id
    return attributes


def _ids(case: JobContext) -> dict[str, str | None]:
    ids = {"task_id": case.task_id}
    return ids if case.traceparent is None else {**ids, "trace_id": case.traceparent[TRACE_ID]}


class StageTimer:
    """Starts on creation; each stage is measured by ``with watch("plan"):``."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the body as ``stage``, a span of the job's trace."""
        start = time.perf_counter()
        try:
            with stage_span(stage):
                yield
        finally:
            self._stages[stage] = time.perf_counter() - start

    def timings(self, rendering: Rendering, queued_s: float | None) -> Timings:
        """Return all stages so far, with what the renderer measured itself, rounded to milliseconds."""
        seconds = {**self._stages, "render": rendering.render_s, "encode": rendering.encode_s}
        if queued_s is not None:
            seconds["queued"] = queued_s
        seconds["total"] = time.perf_counter() - self._start
        return Timings(**{stage: round(seconds[stage], 3) for stage in Timings.model_fields if stage in seconds})
