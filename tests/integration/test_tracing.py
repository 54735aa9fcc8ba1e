# SPDX-License-Identifier: Apache-2.0
"""A producer's trace through a whole worker: exported spans, events, objects in S3, and the log."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import boto3
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

TRACE_ID, PARENT_ID = "a" * 32, "b" * 16
STAGES = {"fetch", "plan", "render", "upload"}


class Collector:
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    async def take(self, request: web.Request) -> web.Response:
        told = ExportTraceServiceRequest.FromString(await request.read())
        for resource in told.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response()

    def stages(self) -> dict[str, Span]:
        """Return the stages of the one job that has any, by name."""
        return {span.name: span for span in self.spans if span.name in STAGES}

    def jobs(self) -> dict[str, Span]:
        """Return the spans of jobs, by task id."""
        jobs = [span for span in self.spans if span.name == "process acestep.generate"]
        return {str(attributes_of(span)["acestep.task_id"]): span for span in jobs}


def attributes_of(span: Span) -> dict[str, str | int]:
    values = ((each.key, each.value) for each in span.attributes)
    return {key: value.string_value if value.HasField("string_value") else value.int_value for key, value in values}


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    found, app = Collector(), web.Application()
    app.router.add_post("/v1/traces", found.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield found, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_the_producers_trace_is_continued_wherever_the_job_leaves_a_mark(
    collector: tuple[Collector, str], service_environment: dict[str, str], tmp_path: Path
) -> None:
    found, endpoint = collector
    url = service_environment["ACESTEP_AMQP_URL"]
    settings = service_environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    body = json.dumps({"task_id": "song", "prompt": "x", "audio_format": "wav"}).encode()
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)) as worker,
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        sent = {"headers": {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}}
        await peer.request(body, message_id="m-1", correlation_id="c-1", **sent)
        # Another one, which cannot be read: why is a line of the log.
        await peer.request(b'{"task_id": "bad", "task_type": "dance"}', **sent)
        await eventually(lambda: recorder.terminal("song") and recorder.terminal("bad"), 60)
        await eventually(lambda: found.stages().keys() >= STAGES and found.jobs().keys() >= {"song", "bad"}, 60)
        logged = worker.log_lines(task_id="bad")
    jobs, stages = found.jobs(), found.stages()
    assert {(job.trace_id.hex(), job.parent_span_id.hex()) for job in jobs.values()} == {(TRACE_ID, PARENT_ID)}
    assert {(stage.trace_id.hex(), stage.parent_span_id) for stage in stages.values()} == {
        (TRACE_ID, jobs["song"].span_id)
    }
    assert (
        attributes_of(jobs["song"]).items()
        >= {
            "messaging.message.id": "m-1",
            "messaging.message.conversation_id": "c-1",
        }.items()
    )
    assert jobs["song"].status.code == Status.STATUS_CODE_UNSET
    assert jobs["bad"].status.code == Status.STATUS_CODE_ERROR
    assert attributes_of(jobs["bad"])["error.type"] == "invalid_request"
    assert {event.cloud_event["traceparent"][3:35] for event in recorder.of("song")} == {TRACE_ID}
    assert {line["trace_id"] for line in logged} == {TRACE_ID}
    kept = await asyncio.to_thread(metadata, service_environment)
    assert [each["traceparent"][3:35] for each in kept] == [TRACE_ID] * 2


def metadata(environment: dict[str, str]) -> list[dict[str, str]]:
    """Of the song and of its manifest."""
    service = boto3.client(
        "s3",
        endpoint_url=environment["ACESTEP_S3_ENDPOINT"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    bucket, prefix = environment["ACESTEP_S3_BUCKET"], environment["ACESTEP_S3_PREFIX"]
    names = ("0.wav", "manifest.json")
    return [service.head_object(Bucket=bucket, Key=f"{prefix}/song/{name}")["Metadata"] for name in names]
