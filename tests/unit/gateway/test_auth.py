# SPDX-License-Identifier: Apache-2.0
"""Keys, hosts and origins."""

import json

import pytest

from tests.support.gateway import AUTHORIZED, KEY, gateway, settings_of

ELSEWHERE = "https://elsewhere.example"
OPEN = {"/health", "/healthz", "/readyz"}


@pytest.mark.parametrize(
    ("headers", "token", "status"),
    [
        ({}, None, 401),
        (AUTHORIZED, None, 200),
        ({"Authorization": KEY}, None, 200),
        ({"Authorization": f"bearer {KEY}"}, None, 401),
        ({"Authorization": "Bearer other"}, None, 401),
        ({}, KEY, 200),
        ({"Authorization": "Bearer other"}, KEY, 200),
        (AUTHORIZED, "other", 401),
        ({}, "other", 401),
    ],
)
async def test_the_bodys_key_decides_else_the_header(headers: dict[str, str], token: str | None, status: int) -> None:
    async with gateway(ACESTEP_API_KEY=f"first\n{KEY}\n") as served:
        body = {"prompt": "a"} | ({"ai_token": token} if token else {})
        found, answer = await served.post("/release_task", body, headers=headers)
        assert found == status
        assert status == 200 or answer["detail"] in {
            "Missing ai_token or Authorization header",
            "Invalid ai_token",
            "Invalid API key",
        }


async def test_every_route_needs_the_key_but_those_of_probes() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        for route in served.gateway.routes():
            path = route.name.replace("{task_id}", "x").replace("{rest:.*}", "x")
            async with served.http.request(route.method, served.url + path, json={"messages": []}) as answer:
                assert (answer.status == 401) is (path not in OPEN), path


async def test_keys_are_changed_while_it_runs() -> None:
    async with gateway(ACESTEP_API_KEY="old") as served:
        other = (await served.get("/v1/stats", headers=AUTHORIZED))[0]
        served.gateway.keys.replace(settings_of(ACESTEP_API_KEY=KEY).gateway.keys)
        assert (other, (await served.get("/v1/stats", headers=AUTHORIZED))[0]) == (401, 200)
        assert (await served.get("/v1/stats", headers={"Authorization": "old"}))[0] == 401


async def test_without_a_key_foreign_pages_and_host_names_are_refused() -> None:
    async with gateway() as served:
        for headers in ({"Origin": ELSEWHERE}, {"Origin": "null"}, {"Host": "rebound.example"}):
            status, _ = await served.post(
                "/release_task", data=json.dumps({"prompt": "a"}), headers={"Content-Type": "text/plain", **headers}
            )
            assert status == 403, headers
        assert served.client.published == []
        assert (await served.post("/release_task", {"prompt": "a"}, headers={"Origin": "http://localhost:5173"}))[
            0
        ] == 200


async def test_pages_of_this_machine_and_named_ones_may_read_answers() -> None:
    async with gateway(ACESTEP_API_ORIGINS=f"{ELSEWHERE}, null", ACESTEP_API_KEY=KEY) as served:
        for origin in ("http://localhost:3000", "https://127.0.0.1", ELSEWHERE, "null"):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            async with served.http.options(f"{served.url}/release_task", headers=headers) as answer:
                assert answer.status == 200
                assert answer.headers["Access-Control-Allow-Origin"] == origin
                assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
                assert "Access-Control-Allow-Credentials" not in answer.headers
            async with served.http.get(f"{served.url}/health", headers={"Origin": origin}) as answer:
                assert answer.headers["Access-Control-Allow-Origin"] == origin
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        async with served.http.options(f"{served.url}/release_task", headers=headers) as answer:
            assert (answer.status, answer.headers.get("Access-Control-Allow-Origin")) == (400, None)


async def test_errors_have_one_text_under_both_names_and_a_request_id() -> None:
    async with gateway() as served:
        for method, path, status in (("GET", "/nothing", 404), ("GET", "/release_task", 405)):
            headers = {"X-Request-Id": "mine-1"}
            async with served.http.request(method, served.url + path, headers=headers) as answer:
                body = await answer.json()
                assert (answer.status, body["detail"]) == (status, body["error"])
                assert answer.headers["X-Request-Id"] == "mine-1"


async def test_a_fault_of_ours_is_500_and_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as served:

        async def fail(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(served.gateway.tasks, "find_all", fail)
        status, answer = await served.post("/query_result", {"task_id_list": ["x"]})
        assert (status, answer["detail"]) == (500, "Internal Server Error")
