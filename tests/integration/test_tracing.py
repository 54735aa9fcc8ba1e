# SPDX-License-Identifier: Apache-2.0
"""A producer's trace through a whole worker: exported spans, events, objects in S3, and the log."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import boto3
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from acestep_consumer.broker.topology import REQUESTS
from tests.support.broker import Peer
from tests.support.event_recorder import EventRecorder
from tests.support.listening import GatewayProcess
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

TRACE_ID, OTHER_TRACE_ID, PARENT_ID = "a" * 32, "c" * 32, "b" * 16
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

    def named(self, name: str) -> list[Span]:
        """Return the spans of this name."""
        return [span for span in self.spans if span.name == name]

    def stages(self) -> dict[str, Span]:
        """Return the stages of the job of the first trace that has any, by name."""
        return {span.name: span for span in self.spans if span.name in STAGES and span.trace_id.hex() == TRACE_ID}

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
    gateway = GatewayProcess(tmp_path, settings)
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)) as worker,
        EventRecorder(url) as recorder,
        Peer(url) as peer,
        in_thread(gateway),
    ):
        sent = {"headers": {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}}
        await peer.request(body, message_id="m-1", correlation_id="c-1", **sent)
        # Another one, which cannot be read: why is a line of the log.
        await peer.request(b'{"task_id": "bad", "task_type": "dance"}', **sent)
        await eventually(lambda: recorder.terminal("song") and recorder.terminal("bad"), 60)
        await eventually(lambda: found.stages().keys() >= STAGES and found.jobs().keys() >= {"song", "bad"}, 60)
        logged = worker.log_lines(task_id="bad")
        over_rest = await released(gateway.url, {"traceparent": f"00-{OTHER_TRACE_ID}-{PARENT_ID}-01"})
        await eventually(lambda: over_rest in found.jobs() and found.named(f"publish {REQUESTS}"), 60)
    # A client of the REST API: its request, the message, the job.
    (request,), (publish,) = found.named("POST /release_task"), found.named(f"publish {REQUESTS}")
    chain = [request, publish, found.jobs().pop(over_rest)]
    assert {span.trace_id.hex() for span in chain} == {OTHER_TRACE_ID}
    assert [span.parent_span_id for span in chain] == [bytes.fromhex(PARENT_ID), *(span.span_id for span in chain[:2])]
    assert attributes_of(publish)["acestep.task_id"] == over_rest
    assert {event.cloud_event["traceparent"][3:35] for event in recorder.of(over_rest)} == {OTHER_TRACE_ID}
    jobs, stages = found.jobs(), found.stages()
    del jobs[over_rest]
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


@asynccontextmanager
async def in_thread(process: GatewayProcess) -> AsyncIterator[None]:
    """Start and end it without holding up the event loop, which serves the collector."""
    await asyncio.to_thread(process.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(process.__exit__, None, None, None)


async def released(url: str, headers: dict[str, str]) -> str:
    """Send a request over REST until the gateway is connected; returns the task's id."""
    async with asyncio.timeout(60), aiohttp.ClientSession(headers=headers) as http:
        while True:
            async with http.get(f"{url}/readyz") as ready:
                if ready.status == 200:
                    break
            await asyncio.sleep(0.1)
        async with http.post(f"{url}/release_task", json={"prompt": "x", "audio_format": "wav"}) as answer:
            return str((await answer.json())["data"]["task_id"])


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
