# SPDX-License-Identifier: Apache-2.0
"""Health, models, statistics, and routes that make no sense over a queue."""

import pytest

from acestep_schemas.events import LmChoice
from tests.support.gateway import announced, completed, gateway, started, unfinished
from tests.support.waiting import eventually

LM = LmChoice(model="acestep-5Hz-lm-1.7B", backend="vllm")


async def test_health_answers_whatever_else_is_there() -> None:
    async with gateway() as served:
        status, answer = await served.get("/health")
        assert status == 200
        assert answer["data"] == {
            "status": "ok",
            "service": "ACE-Step API",
            "version": "1.0",
            "models_initialized": False,
            "llm_initialized": False,
            "loaded_model": None,
            "loaded_lm_model": None,
        }
        await served.send(announced(models=("acestep-v15-turbo",), lm=LM))
        data = (await served.get("/api/health"))[1]["data"]
        assert (data["models_initialized"], data["llm_initialized"]) == (True, True)
        assert (data["loaded_model"], data["loaded_lm_model"]) == ("acestep-v15-turbo", LM.model)


async def test_models_are_those_of_the_workers_that_are_there() -> None:
    async with gateway(ACESTEP_API_MODELS="acestep-v15-base") as served:
        assert (await served.get("/v1/models"))[1]["data"][0]["id"] == "acestep/acestep-v15-base"
        await served.send(announced(models=("acestep-v15-turbo",), lm=None))
        listed = (await served.get("/v1/models"))[1]
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["acestep/acestep-v15-turbo"]
        assert set(listed["data"][0]) == {
            *("id", "name", "created", "input_modalities", "output_modalities", "context_length"),
            *("max_output_length", "pricing", "description", "architecture"),
        }
        inventory = (await served.get("/v1/model_inventory"))[1]["data"]
        assert inventory == {
            "models": [
                {
                    "name": "acestep-v15-turbo",
                    "is_default": True,
                    "is_loaded": True,
                    "supported_task_types": ["cover", "cover-nofsq", "repaint", "text2music"],
                }
            ],
            "default_model": "acestep-v15-turbo",
            "lm_models": [],
            "loaded_lm_model": None,
            "llm_initialized": False,
        }
        await served.send(announced(state="stopped"))
        assert (await served.get("/v1/models"))[1]["data"][0]["id"] == "acestep/acestep-v15-base"


async def test_statistics_count_what_this_replica_was_told() -> None:
    async with gateway(ACESTEP_QUEUE_MAXSIZE="50") as served:
        served.client.ready = 7
        await eventually(lambda: served.gateway.session.queue_size == 7)
        await served.send(started("a"), completed("b"), unfinished("failed", "c"), announced(in_hand=3))
        data = (await served.get("/v1/stats"))[1]["data"]
        assert data == {
            "jobs": {"total": 12, "queued": 7, "running": 3, "succeeded": 1, "failed": 1},
            "queue_size": 7,
            "queue_maxsize": 50,
            "avg_job_seconds": 8.6,
        }


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (None, 200),
        ({}, 200),
        ({"model": "acestep-v15-turbo", "slot": 2}, 200),
        ({"model": "acestep/acestep-v15-turbo", "init_llm": True, "lm_model_path": "x/acestep-5Hz-lm-1.7B"}, 200),
        ({"model": "acestep-v15-base"}, 400),
        ({"lm_model_path": "acestep-5Hz-lm-4B"}, 400),
        ({"slot": 4}, 400),
        ({"slot": "x"}, 400),
    ],
)
async def test_init_loads_nothing_and_says_whether_the_model_is_there(body: object, code: int) -> None:
    async with gateway() as served:
        await served.send(announced(models=("acestep-v15-turbo",), lm=LM))
        status, answer = await served.post("/v1/init", body)
        assert (status, answer["code"]) == (200, code)
        assert (answer["data"] is None) is (code != 200)
        assert bool(answer["error"]) is (code != 200)


async def test_no_lora_is_loaded_and_none_can_be() -> None:
    async with gateway() as served:
        data = (await served.get("/v1/lora/status"))[1]["data"]
        assert (data["lora_loaded"], data["use_lora"], data["adapters"]) == (False, False, [])
        for name in ("load", "unload", "toggle", "scale"):
            status, answer = await served.post(f"/v1/lora/{name}", {})
            assert status == 501
            assert "the field lora of /release_task" in answer["detail"]
            assert answer["error"] == answer["detail"]


@pytest.mark.parametrize(
    "path", ["/v1/reinitialize", "/v1/transcribe", "/v1/training/start", "/v1/dataset/a/b", "/api/v1/training/start"]
)
async def test_what_makes_no_sense_over_a_queue_says_what_to_do(path: str) -> None:
    async with gateway() as served:
        status, answer = await served.post(path, {})
        assert status == 501
        assert len(answer["detail"]) > 20


async def test_probes_and_metrics_say_what_is_the_matter() -> None:
    async with gateway() as served:
        assert await served.get("/healthz") == (200, {"status": "alive"})
        assert await served.get("/readyz") == (200, {"status": "ready", "checks": {"broker": True}})
        await served.get("/v1/lora/status")
        await served.get("/api/v1/stats")
        await served.get("/made/up/12345")
        async with served.http.get(f"{served.url}/metrics") as answer:
            page = await answer.text()
        assert 'acestep_gateway_requests_total{route="/v1/stats",status="200"} 1.0' in page
        assert 'acestep_gateway_requests_total{route="other",status="404"} 1.0' in page
        assert "acestep_gateway_broker_up 1.0" in page
        assert "12345" not in page
