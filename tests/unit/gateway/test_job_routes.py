# SPDX-License-Identifier: Apache-2.0
"""Single tasks: their manifests, and their progress as server-sent events."""

import asyncio
import json

from tests.support.gateway import completed, gateway, progress, started, unfinished
from tests.support.waiting import WITHIN_S, eventually


async def test_a_task_is_shown_with_its_manifest_and_without_addresses_in_storage() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        data = (await served.get(f"/v1/jobs/{task_id}"))[1]["data"]
        assert (data["stage"], data["status"], data["manifest"]) == ("queued", 0, None)
        event = served.results.ends[task_id] = completed(task_id)
        await served.send(event)
        _, answer = await served.get(f"/v1/jobs/{task_id}")
        data = answer["data"]
        assert (data["stage"], data["status"]) == ("succeeded", 1)
        assert data["manifest"]["audios"][0]["file"] == data["result"][0]["file"]
        assert data["manifest"]["timings"]["total"] == 8.6
        assert "s3://" not in json.dumps(answer)
        served.results.ends["other"] = unfinished("rejected", "other")
        assert (await served.get("/v1/jobs/other"))[1]["data"]["manifest"]["error"]["code"] == "invalid_request"
        assert (await served.get("/v1/jobs/never"))[0] == 404


async def test_progress_is_streamed_until_the_end() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        async with asyncio.timeout(WITHIN_S), served.http.get(f"{served.url}/v1/jobs/{task_id}/events") as answer:
            assert answer.content_type == "text/event-stream"
            for event in (started(task_id), progress(task_id, 0.5), completed(task_id)):
                await eventually(lambda: served.gateway.tasks._open[task_id].waiters)
                await served.send(event)
            text = (await answer.read()).decode()
        events = [block.split("\n") for block in text.strip().split("\n\n")]
        assert [lines[0] for lines in events] == [
            "event: queued",
            "event: running",
            "event: running",
            "event: succeeded",
        ]
        assert json.loads(events[2][1].removeprefix("data: "))["progress"] == 0.5
        assert json.loads(events[3][1].removeprefix("data: "))["result"][0]["seed_value"] == "40"


async def test_streams_end_when_the_server_does() -> None:
    async with gateway() as served:
        task_id = await served.release({"prompt": "a"})
        async with served.http.get(f"{served.url}/v1/jobs/{task_id}/events") as answer:
            await answer.content.readline()
            await eventually(lambda: served.gateway.tasks._open[task_id].waiters)
            await served.gateway._job_routes.close(served.gateway.application())
            async with asyncio.timeout(WITHIN_S):
                assert b"keep alive" not in await answer.read()
