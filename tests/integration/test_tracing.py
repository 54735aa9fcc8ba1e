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

from tests.support.broker import Peer
from tests.support.ear import Ear
from tests.support.waiting import eventually
from tests.support.worker import WorkerProcess, running

TRACE_ID, PARENT_ID = "a" * 32, "b" * 16
STAGES = {"fetch", "plan", "render", "upload"}


class Collector:
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[str, str]] = {}
        """By name: the trace that a span belongs to, and its parent."""

    async def take(self, request: web.Request) -> web.Response:
        told = ExportTraceServiceRequest.FromString(await request.read())
        for resource in told.resource_spans:
            for scope in resource.scope_spans:
                self.spans |= {span.name: (span.trace_id.hex(), span.parent_span_id.hex()) for span in scope.spans}
        return web.Response()


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
    async with running(WorkerProcess(tmp_path, settings, light=True)) as worker, Ear(url) as ear, Peer(url) as peer:
        await peer.request(body, headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
        # Another one, which cannot be read: why is a line of the log.
        await peer.request(b'{"task_id": "bad", "bpm": "x"}', headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
        await eventually(lambda: ear.terminal("song") and ear.terminal("bad"), 60)
        await eventually(lambda: found.spans.keys() >= STAGES, 60)
        logged = worker.log_lines(task_id="bad")
    assert found.spans["process acestep.generate"] == (TRACE_ID, PARENT_ID)
    assert {found.spans[stage][0] for stage in STAGES} == {TRACE_ID}
    assert {heard.event["traceparent"][3:35] for heard in ear.of("song")} == {TRACE_ID}
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
