# SPDX-License-Identifier: Apache-2.0
"""Distributed tracing with OpenTelemetry, where it is installed and configured; else ``traceparent`` is only forwarded.

A message's header ``traceparent`` (W3C Trace Context) makes its job a part of the producer's trace: a span for the job,
and one for each stage. Names follow OpenTelemetry's conventions for messaging. Where those leave a choice, the
producer's context is the parent of the job's span, not a link: a job is one message.

Exporters are configured by OpenTelemetry's variables, mainly ``OTEL_EXPORTER_OTLP_ENDPOINT``; without one of them
nothing is recorded.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import structlog

from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.job import Rendering
from acestep_consumer.domain.outcome import Ending
from acestep_consumer.domain.ports import Report
from acestep_consumer.domain.stages import STAGES
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
"""Position of the trace id in a ``traceparent``."""

_PARENT_ID, _FLAGS = slice(36, 52), slice(53, 55)
_NAME: Final = "acestep-consumer"
_QUEUE: Final = "acestep.generate"
_REQUESTS: Final = "acestep.requests"
_SERVER_ERROR: Final = 500
_ATTRIBUTES: Final[dict[str, str | int]] = {
    "messaging.system": "rabbitmq",
    "messaging.operation.type": "process",
    "messaging.operation.name": "process",
}
_PROTOCOLS: Final = ("http/protobuf",)
_COMPRESSIONS: Final = ("none", "gzip", "deflate")
_SAMPLERS: Final = (
    *("always_on", "always_off", "traceidratio"),
    *("parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio"),
)
_SUPPORTED: Final[Mapping[str, tuple[str, ...]]] = {
    "OTEL_TRACES_EXPORTER": ("otlp", "none"),
    "OTEL_EXPORTER_OTLP_PROTOCOL": _PROTOCOLS,
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": _PROTOCOLS,
    "OTEL_EXPORTER_OTLP_COMPRESSION": _COMPRESSIONS,
    "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": _COMPRESSIONS,
    "OTEL_TRACES_SAMPLER": _SAMPLERS,
}
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# What the SDK makes of any other number is its default, with a line in the log.
_NUMBERS: Final[Mapping[str, tuple[float, float, str]]] = {
    "OTEL_TRACES_SAMPLER_ARG": (0, 1, "a number from 0 to 1"),
    "OTEL_EXPORTER_OTLP_TIMEOUT": (0, 86_400, "a number of seconds"),
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": (0, 86_400, "a number of seconds"),
}
_VARIABLES: Final = (*_ENDPOINTS, "OTEL_TRACES_EXPORTER")
_GENERAL, _OF_TRACES = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"

log = structlog.get_logger()

if INSTALLED:
    # Once: a look-up takes longer than a span. It uses the provider that is set later.
    tracer: trace.Tracer = trace.get_tracer(_NAME)


class TracingMisconfigured(ValueError):
    """A variable of OpenTelemetry has a value that cannot be followed."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"tracing cannot be set up, check the variables OTEL_…: {reason}")


def set_up_tracing(instance_id: str, service: str = _NAME) -> None:
    """Record spans and export them as OpenTelemetry's variables say, if any is set.

    Raises:
        TracingMisconfigured: spans would go elsewhere than the variables say, or nowhere.
    """
    if os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return
    if not any(os.environ.get(name, "").strip() for name in _VARIABLES):
        return
    for variable, rule in _broken_rules():
        raise TracingMisconfigured(f"{variable}={os.environ[variable]}: must be {rule}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - as above
    except ImportError as error:
        log.warning("tracing is off", missing=error.name, fix="pip install 'acestep-consumer[otel]'")
        return
    resource = Resource.create({"service.name": service, "service.instance.id": instance_id})
    try:
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise TracingMisconfigured(error) from error
    trace.set_tracer_provider(provider)


def _broken_rules() -> Iterator[tuple[str, str]]:
    """Yield the variables that OpenTelemetry would read otherwise than they are meant, and what they must be."""
    given = {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and value.strip()}
    for name in tuple(given):
        # One for all signals is not read where there is one for traces.
        if name.startswith(_GENERAL) and name.replace(_GENERAL, _OF_TRACES) in given:
            del given[name]
    if not given.get("OTEL_TRACES_SAMPLER", "").endswith("traceidratio"):
        given.pop("OTEL_TRACES_SAMPLER_ARG", None)
    for name, supported in _SUPPORTED.items():
        # The SDK strips all of them but the sampler.
        text = given.get(name, supported[0])
        if (text if name == "OTEL_TRACES_SAMPLER" else text.strip()).lower() not in supported:
            yield name, " or ".join(supported)
    for name in _ENDPOINTS:
        if name in given and not given[name].strip().lower().startswith(("http://", "https://")):
            yield name, "a URL with its scheme, such as http://127.0.0.1:4318"
    for name, (least, most, rule) in _NUMBERS.items():
        if name in given and not least <= _number(given[name]) <= most:
            yield name, rule


def _number(text: str) -> float:
    """Return a number; not-a-number, which no range has, for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def job_span(context: JobContext) -> Iterator[None]:
    """Run the body in the span of a job, and set ``traceparent`` of ``context`` to it."""
    context.traceparent = context.delivery.traceparent
    if not INSTALLED:
        with structlog.contextvars.bound_contextvars(**_ids(context)):
            yield
        return
    queue = _QUEUE if context.delivery.tier is None else f"{_QUEUE}.{context.delivery.tier}"
    span = tracer.start_span(
        f"process {queue}",
        _context_of(context.traceparent),
        kind=trace.SpanKind.CONSUMER,
        attributes=_attributes(context, queue),
    )
    if span.is_recording():
        context.traceparent = _traceparent(span.get_span_context())
    with structlog.contextvars.bound_contextvars(**_ids(context)), _used(span):
        yield


@contextmanager
def stage_span(stage: str) -> Iterator[None]:
    """Run the body in a span below the job's."""
    if not INSTALLED or not trace.get_current_span().is_recording():
        yield
        return
    with _used(tracer.start_span(stage)):
        yield


@contextmanager
def _used(span: "trace.Span") -> Iterator[None]:
    """Run the body in a span, which notes the error that ends it."""
    with trace.use_span(span, end_on_exit=True):
        try:
            yield
        except Exception as error:
            span.set_attribute("error.type", _type_of(error))
            raise


@contextmanager
def http_request_span(method: str, route: str, traceparent: str | None) -> Iterator[None]:
    """Run the body in the span of a request to the REST API, part of the client's trace if it sent one."""
    if not INSTALLED:
        yield
        return
    attributes = {"http.request.method": method, "http.route": route}
    span = tracer.start_span(
        f"{method} {route}", _context_of(traceparent), kind=trace.SpanKind.SERVER, attributes=attributes
    )
    with trace.use_span(span, end_on_exit=True):
        yield


def note_http_status(status: int) -> None:
    """Set the status of the request's span."""
    if not INSTALLED or not (span := trace.get_current_span()).is_recording():
        return
    span.set_attribute("http.response.status_code", status)
    if status >= _SERVER_ERROR:
        span.set_attribute("error.type", str(status))
        span.set_status(trace.StatusCode.ERROR)


@contextmanager
def publish_span(task_id: str, traceparent: str | None) -> Iterator[str | None]:
    """Run the body in the span of a publish; yields the ``traceparent`` for the message.

    Without a recorded span that is the caller's own, which is forwarded then.
    """
    if not INSTALLED or not trace.get_current_span().is_recording():
        yield traceparent
        return
    attributes = {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "send",
        "messaging.operation.name": "publish",
        "messaging.destination.name": _REQUESTS,
        "messaging.message.id": task_id,
        "acestep.task_id": task_id,
    }
    span = tracer.start_span(f"publish {_REQUESTS}", kind=trace.SpanKind.PRODUCER, attributes=attributes)
    with trace.use_span(span, end_on_exit=True):
        yield _traceparent(span.get_span_context())


def note_end(ending: Ending) -> None:
    """Set state and error of the job's span, unless the job is completed. A cancelled one is no error.

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
    """Return a value of low cardinality: one of ``acestep_schemas.events.ErrorCode``, or an exception's name."""
    return error.code.value if isinstance(error, ConsumerError) else type(error).__name__


def _context_of(traceparent: str | None) -> "Context":
    """Return the producer's context, empty without one. ``traceparent`` is well formed, as a delivery's is."""
    if traceparent is None:
        return Context()
    sent = trace.SpanContext(
        int(traceparent[TRACE_ID], 16),
        int(traceparent[_PARENT_ID], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(traceparent[_FLAGS], 16)),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(sent), Context())


def _traceparent(of: "trace.SpanContext") -> str:
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}"


def _attributes(context: JobContext, queue: str) -> dict[str, str | int]:
    """Attributes of a job's span. The queue is the destination: routing keys would have a high cardinality."""
    delivery = context.delivery
    attributes = {
        **_ATTRIBUTES,
        "messaging.destination.name": queue,
        "messaging.message.body.size": len(delivery.body),
    }
    if delivery.message_id is not None:
        attributes["messaging.message.id"] = delivery.message_id
    if (conversation := delivery.reply.correlation_id) is not None:
        attributes["messaging.message.conversation_id"] = conversation
    if context.task_id is not None:
        attributes["acestep.task_id"] = context.task_id
    return attributes


def _ids(context: JobContext) -> dict[str, str | None]:
    ids = {"task_id": context.task_id}
    return ids if context.traceparent is None else {**ids, "trace_id": context.traceparent[TRACE_ID]}


class StageCounts:
    """Counts the running jobs of a worker by stage."""

    def __init__(self) -> None:
        self._jobs = dict.fromkeys(STAGES, 0)

    @property
    def jobs(self) -> Mapping[str, int]:
        """Jobs that are in each stage now, waiting ones included."""
        return dict(self._jobs)

    def move(self, before: str | None, after: str | None) -> None:
        """Move one job from a stage to another; None: it is in none."""
        if before is not None:
            self._jobs[before] -= 1
        if after is not None:
            self._jobs[after] += 1


class StageTimer:
    """Measures the stages of a job, each by ``with timer("plan"):``; the total counts from its creation.

    ``counts`` has the job in the stage that it is in.
    """

    def __init__(self, counts: StageCounts) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}
        self._counts = counts
        self._now: str | None = None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the body as ``stage``, in a span."""
        start = time.perf_counter()
        self._enter(stage)
        try:
            with stage_span(stage):
                yield
        finally:
            self._enter(None)
            self._stages[stage] = time.perf_counter() - start

    def rendering(self, report: Report) -> Report:
        """Return ``report`` for the renderer, which encodes as well: its reports tell when a job goes on to that."""

        def observed(fraction: float, stage: str) -> None:
            if self._now in {"render", "encode"}:
                self._enter("encode" if stage == "encode" or fraction >= 1 else "render")
            report(fraction, stage)

        return observed

    def _enter(self, stage: str | None) -> None:
        self._counts.move(self._now, stage)
        self._now = stage

    def timings(self, rendering: Rendering, queued_s: float | None) -> Timings:
        """Return all stages so far, with the renderer's own measurements, seconds rounded to milliseconds."""
        seconds = {**self._stages, "render": rendering.render_s, "encode": rendering.encode_s}
        if queued_s is not None:
            seconds["queued"] = queued_s
        seconds["total"] = time.perf_counter() - self._start
        return Timings(**{stage: round(seconds[stage], 3) for stage in Timings.model_fields if stage in seconds})
