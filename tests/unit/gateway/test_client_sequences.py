# SPDX-License-Identifier: Apache-2.0
"""The requests of programs for ACE-Step's server, in their order, and what each reads of the answers.

Clients that a registry has run unmodified in `tests/integration/test_gateway.py`; these are written down from what the
others send.
"""

import json
import re
from typing import Any

import aiohttp
from yarl import URL

from tests.support.gateway import AUTHORIZED, KEY, Served, announced, completed, gateway, progress, started, unfinished

MODEL = "acestep-v15-turbo"


async def end(served: Served, task_id: str, songs: int = 1) -> None:
    """Let a task end with songs that are in storage."""
    await served.send(started(task_id), progress(task_id), completed(task_id, songs))
    served.results.stored |= {f"s3://acestep/jobs/{task_id}/{index}.mp3": b"s" * 5000 for index in range(songs)}


async def song(served: Served, address: str, **headers: str) -> bytes:
    """What a client saves that follows no redirect."""
    async with served.http.get(address, headers=headers, allow_redirects=False) as answer:
        assert (answer.status, answer.content_type) == (200, "audio/mpeg")
        return await answer.read()


async def test_a_web_interface_that_loads_a_model_before_each_job_and_sends_its_list_as_text() -> None:
    async with gateway() as served:
        await served.send(announced(models=(MODEL,)))
        assert (await served.get("/health"))[1]["data"]["status"] == "ok"
        assert (await served.get("/v1/models"))[1]["data"][0]["id"] == f"acestep/{MODEL}"
        status, answer = await served.post("/v1/init", {"model": MODEL, "slot": 1})
        assert (status, answer["code"], answer["error"]) == (200, 200, None)
        body = {"prompt": "a", "lyrics": "", "audio_duration": 60, "batch_size": 1, "thinking": "None"}
        task_id = await served.release(body)
        await end(served, task_id)
        status, answer = await served.post("/query_result", {"task_id_list": json.dumps([task_id])})
        (item,) = json.loads(answer["data"][0]["result"])
        assert (answer["data"][0]["status"], item["file"].startswith("/v1/audio?path=")) == (1, True)
        assert await song(served, served.url + item["file"]) == b"s" * 5000


async def test_a_workstation_that_sends_files_before_fields_and_a_results_path_as_a_source() -> None:
    async with gateway() as served:
        await served.send(announced(models=("acestep-v15-base",)))
        (model,) = (await served.get("/api/v1/model_inventory"))[1]["data"]["models"]
        assert model["is_loaded"]
        assert "lego" in model["supported_task_types"]
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("src_audio", b"RIFF", filename="mix.wav")
        for name, value in {"task_type": "lego", "track_name": "drums", "prompt": "a", "batch_size": "1"}.items():
            form.add_field(name, value)
        task_id = (await served.post("/api/release_task", data=form))[1]["data"]["task_id"]
        assert served.client.published[-1]["src_audio_path"].endswith(f"/uploads/{task_id}/src_audio_path.wav")
        await end(served, task_id)
        item = json.loads((await served.query(task_id))[0]["result"])[0]
        assert await song(served, f"{served.url}/api{item['file']}") == b"s" * 5000
        # It takes the path out of the address, decodes it, and has no need to upload what the server has.
        path = URL(item["file"]).query["path"]
        body = {"task_type": "repaint", "src_audio_path": path, "prompt": "b", "repainting_start": 1}
        await served.release(body)
        assert served.client.published[-1]["src_audio_path"] == f"s3://acestep/jobs/{task_id}/0.mp3"


async def test_a_shell_script_with_a_key_in_the_header_that_polls_and_saves_without_redirects() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        status, answer = await served.post("/release_task", {"prompt": "a"})
        assert (status, answer["detail"]) == (401, "Missing ai_token or Authorization header")
        task_id = await served.release({"prompt": "a", "thinking": True, "audio_format": "mp3"}, headers=AUTHORIZED)
        poll: dict[str, Any] = {"json": {"task_id_list": [task_id]}, "headers": AUTHORIZED}
        for expected in (0, 1):
            async with served.http.post(f"{served.url}/query_result", **poll) as answer:
                entry = (await answer.json())["data"][0]
            assert entry["status"] == expected
            if not expected:
                await end(served, task_id, songs=2)
        for index, item in enumerate(json.loads(entry["result"])):
            assert await song(served, f"{served.url}{item['file']}", **AUTHORIZED) == b"s" * 5000
            assert re.search(r"%2F(\d)\.mp3$", item["file"]) is not None, index


async def test_a_chat_bot_with_a_token_in_the_body_and_a_player_with_it_in_the_address() -> None:
    async with gateway(ACESTEP_API_KEY=KEY) as served:
        task_id = await served.release({"caption": "a", "ai_token": KEY, "param_obj": json.dumps({"duration": 20})})
        assert KEY not in json.dumps(served.client.published)
        await end(served, task_id)
        (entry,) = await served.query(task_id, ai_token=KEY)
        (item,) = json.loads(entry["result"])
        # One of the other dialect takes `url`, and quotes the whole address once more.
        assert item["url"] == item["file"]
        assert await song(served, f"{served.url}{item['file']}&ai_token={KEY}") == b"s" * 5000
        again = URL(f"{served.url}/v1/audio").with_query(path=item["url"], ai_token=KEY)
        assert await song(served, str(again)) == b"s" * 5000


async def test_a_plug_in_that_asks_for_loras_reads_the_first_item_and_the_error() -> None:
    async with gateway() as served:
        assert (await served.get("/v1/lora/status"))[1]["data"]["lora_loaded"] is False
        task_id = await served.release({"prompt": "a", "task_type": "text2music"})
        await served.send(unfinished("failed", task_id))
        (entry,) = await served.query(task_id)
        first = json.loads(entry["result"])[0]
        assert (entry["status"], first["status"], first["file"]) == (2, 2, "")
        assert first["error"]
        status, answer = await served.post("/v1/lora/load", {"lora_path": "/loras/a"})
        assert (status, "field lora" in answer["error"], answer["error"] == answer["detail"]) == (501, True, True)
