# SPDX-License-Identifier: Apache-2.0
"""The page of `listen` on the API's port: behind the same key, and not for other sites."""

import base64
import json

import pytest

from acestep_schemas import examples
from acestep_schemas.events import WorkerEvent
from tests.support.gateway import AUTHORIZED, KEY, completed, gateway

WANTED = {"prompt": "slow jazz"}


def login(password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"}


@pytest.mark.parametrize("headers", [{}, AUTHORIZED, login("wrong"), login(""), {"Authorization": "Basic !"}])
async def test_nothing_of_the_page_is_reachable_without_the_key(headers: dict[str, str]) -> None:
    async with gateway(ACESTEP_API_KEY=KEY, ACESTEP_API_PAGE="true") as served:
        same = {"Origin": served.url}
        for method, path in (
            ("GET", "/"),
            ("GET", "/page.js"),
            ("GET", "/player.js"),
            ("GET", "/options"),
            ("GET", "/songs.zip"),
            ("GET", "/style.css"),
            ("GET", "/icon.svg"),
            ("GET", "/events"),
            ("GET", "/audio/a/0"),
            ("POST", "/jobs"),
            ("POST", "/jobs/a/cancel"),
            ("POST", "/jobs/a/show"),
        ):
            async with served.http.request(method, served.url + path, json=WANTED, headers=headers | same) as answer:
                assert answer.status == 401, path
                assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert served.client.published == []


async def test_with_the_key_it_shows_jobs_and_songs_and_sends_requests() -> None:
    async with gateway(ACESTEP_API_KEY=KEY, ACESTEP_API_PAGE="true") as served:
        served.results.stored["s3://acestep/jobs/done/0.mp3"] = b"s" * 5000
        await served.send(completed("done"))
        async with served.http.get(f"{served.url}/", headers=login(KEY)) as answer:
            assert (answer.status, answer.content_type) == (200, "text/html")
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        async with served.http.get(f"{served.url}/events", headers=login(KEY)) as events:
            text = b""
            while b'"done"' not in text:
                text += await events.content.readany()
        async with served.http.get(f"{served.url}/audio/done/0", headers=login(KEY)) as answer:
            assert (answer.status, len(await answer.read())) == (200, 5000)
        status, answer = await served.post("/jobs", WANTED, headers=login(KEY) | {"Origin": served.url})
        assert (status, served.client.published) == (202, [WANTED | {"task_id": answer["task_id"]}])
        assert (await served.post("/jobs", WANTED, headers=login(KEY)))[0] == 403
        assert (await served.post("/jobs", WANTED, headers=login(KEY) | {"Origin": "https://a.example"}))[0] == 403
        # A browser adds the login to every request to this server, of other sites as well: the API takes none.
        assert (await served.post("/release_task", WANTED, headers=login(KEY)))[0] == 401
        assert (await served.get("/v1/stats", headers=login(KEY)))[0] == 401


async def test_without_a_key_it_is_for_this_machine_and_without_the_setting_for_nobody() -> None:
    async with gateway(ACESTEP_API_PAGE="true", ACESTEP_API_TASKS_PER_MINUTE="1") as served:
        assert (await served.post("/jobs", WANTED, headers={"Origin": served.url}))[0] == 202
        assert (await served.post("/jobs", WANTED, headers={"Origin": served.url}))[0] == 429
        assert (await served.post("/jobs", WANTED, headers={"Origin": "http://localhost:1"}))[0] == 403
        large = {"Origin": served.url}
        assert (await served.post("/jobs", {"prompt": "a" * 300_000}, headers=large))[0] in (413, 429)
        async with served.http.get(f"{served.url}/", headers={"Host": "rebound.example"}) as answer:
            assert answer.status == 403
    async with gateway() as served, served.http.get(f"{served.url}/") as answer:
        assert answer.status == 404


async def test_the_page_of_the_gateway_knows_the_workers_and_the_place_of_its_requests() -> None:
    async with gateway(ACESTEP_API_PAGE="true") as served:
        worker = examples.worker().data.model_copy(update={"lm": None, "models": ("acestep-v15-turbo",)})
        await served.send(WorkerEvent.of(worker))
        status, answer = await served.post("/jobs", WANTED, headers={"Origin": served.url})
        assert status == 202
        async with served.http.get(f"{served.url}/events") as events:
            text = b""
            while b"data: " not in text or not text.endswith(b"\n\n"):
                text += await events.content.readany()
        update = json.loads(text.partition(b"data: ")[2])
        assert update["workers"] == {"lm": False, "models": ["acestep-v15-turbo"]}
        assert update["places"][answer["task_id"]]["place"] == 1
        status, options = await served.get("/options")
        assert (status, "prompt" in options["fields"], "src_audio_base64" in options["fields"]) == (200, True, False)
