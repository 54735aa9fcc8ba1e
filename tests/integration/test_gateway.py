# SPDX-License-Identifier: Apache-2.0
"""The REST API as an operator runs it: two replicas, a real broker and S3, and a light worker."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import pytest

from infra.local.demo import song_over_rest
from infra.local.rabbitmq import RabbitMQ
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.support.listening import ListenProcess
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, WorkerProcess, clean_environment

KEY = "integration-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
WAITING = 2


class GatewayProcess(ListenProcess):
    """The gateway on a free port."""

    command = "gateway"


@dataclass(frozen=True)
class Replicas:
    """Two replicas, a worker, and the settings of all."""

    urls: tuple[str, str]
    environment: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def replicas(
    rabbitmq: RabbitMQ, management: ManagementApi, s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    """Two replicas and a worker on a virtual host of their own."""
    vhost, folder = f"gateway-{uuid.uuid4().hex}", tmp_path_factory.mktemp("gateway")
    management.add_vhost(vhost)
    environment = Environment.of(rabbitmq.vhost_url(vhost), s3).variables() | {
        "ACESTEP_S3_PREFIX": vhost,
        "ACESTEP_QUEUE_MAXSIZE": str(WAITING),
        "ACESTEP_API_KEY": KEY,
        "ACESTEP_SCRATCH_DIR": str(folder),
    }
    with ExitStack() as running:
        running.callback(management.delete_vhost, vhost)
        running.enter_context(WorkerProcess(folder, environment, light=True))
        one = running.enter_context(GatewayProcess(folder, environment))
        other = running.enter_context(GatewayProcess(folder, environment))
        yield Replicas((one.url, other.url), environment, folder)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers=AUTHORIZED) as session:
        yield session


async def release(http: aiohttp.ClientSession, url: str, body: object) -> str:
    async with asyncio.timeout(WITHIN_S):
        while True:
            async with http.post(f"{url}/release_task", json=body) as answer:
                if answer.status == 503:  # it has not subscribed yet
                    await asyncio.sleep(0.1)
                    continue
                assert answer.status == 200, await answer.text()
                return str((await answer.json())["data"]["task_id"])


async def entry_of(http: aiohttp.ClientSession, url: str, task_id: str, **more: object) -> dict[str, Any]:
    async with http.post(f"{url}/query_result", json={"task_id_list": [task_id], **more}) as answer:
        assert answer.status == 200, await answer.text()
        (entry,) = (await answer.json())["data"]
        return dict(entry)


async def end_of(http: aiohttp.ClientSession, url: str, task_id: str) -> dict[str, Any]:
    async with asyncio.timeout(WITHIN_S):
        while True:
            entry = await entry_of(http, url, task_id, wait=5)
            if entry["status"]:
                return entry


async def song_of(http: aiohttp.ClientSession, url: str, entry: dict[str, Any]) -> bytes:
    assert entry["status"] == 1, entry
    async with http.get(url + json.loads(entry["result"])[0]["file"], allow_redirects=False) as answer:
        assert (answer.status, answer.content_type) == (200, "audio/wav")
        return await answer.read()


async def test_a_task_of_one_replica_is_answered_by_the_other(replicas: Replicas, http: aiohttp.ClientSession) -> None:
    one, other = replicas.urls
    task_id = await release(http, one, {"prompt": "takes=0.2", "audio_format": "wav", "audio_duration": 30})
    entry = await end_of(http, other, task_id)
    items = json.loads(entry["result"])
    assert len(items) == 2
    song = await song_of(http, other, entry)
    assert hashlib.sha256(song).hexdigest() == items[0]["sha256"]
    assert await song_of(http, one, await end_of(http, one, task_id)) == song


async def test_an_upload_and_a_song_of_ours_are_sources(replicas: Replicas, http: aiohttp.ClientSession) -> None:
    one, other = replicas.urls
    first = await end_of(http, one, await release(http, one, {"prompt": "a", "audio_format": "wav"}))
    song, path = await song_of(http, one, first), json.loads(first["result"])[0]["file"]
    body = {"prompt": "a", "task_type": "cover", "src_audio_path": path, "audio_format": "wav"}
    assert (await end_of(http, one, await release(http, other, body)))["status"] == 1
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("src_audio", song, filename="song.wav")
    for name, value in (("task_type", "cover"), ("prompt", "a"), ("audio_format", "wav")):
        form.add_field(name, value)
    async with http.post(f"{other}/release_task", data=form) as answer:
        assert answer.status == 200, await answer.text()
        task_id = (await answer.json())["data"]["task_id"]
    assert (await end_of(http, one, task_id))["status"] == 1
    assert stored(replicas, f"uploads/{task_id}/src_audio_path.wav") == song


async def test_a_replica_that_starts_later_knows_what_was_before(
    replicas: Replicas, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    waiting = {"prompt": f"until={gate}", "audio_format": "wav", "batch_size": 1}
    running, queued = [await release(http, replicas.urls[0], waiting) for _ in range(2)]
    with GatewayProcess(tmp_path, replicas.environment) as third:
        assert json.loads((await entry_of(http, third.url, queued))["result"])[0]["stage"] == "queued"
        assert (await entry_of(http, third.url, str(uuid.uuid4())))["result"] == "[]"
        async with http.post(f"{third.url}/cancel_task", json={"task_id": queued}) as answer:
            assert answer.status in (200, 503)
        gate.touch()
        assert (await end_of(http, third.url, running))["status"] == 1
        assert (await end_of(http, third.url, queued))["status"] in (1, 2)
        # Ctrl-C in the middle of a poll: the client is cut off, and another replica goes on.
        os.kill(third.process.id.pid, signal.SIGTERM)
    assert (await entry_of(http, replicas.urls[1], running))["status"] == 1


async def test_a_full_queue_is_429_and_takes_requests_again(
    replicas: Replicas, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    body = {"prompt": f"until={gate}", "audio_format": "wav", "batch_size": 1}
    accepted = []
    async with asyncio.timeout(WITHIN_S):
        while True:
            async with http.post(f"{replicas.urls[0]}/release_task", json=body) as answer:
                if answer.status == 429:
                    assert int(answer.headers["Retry-After"]) >= 1
                    break
                assert answer.status == 200
                accepted.append((await answer.json())["data"]["task_id"])
    gate.touch()
    assert len(accepted) >= WAITING
    for task_id in accepted:
        assert (await end_of(http, replicas.urls[1], task_id))["status"] == 1


async def test_models_and_progress_come_from_the_workers(replicas: Replicas, http: aiohttp.ClientSession) -> None:
    url = replicas.urls[0]
    async with asyncio.timeout(WITHIN_S):
        while True:
            async with http.get(f"{url}/v1/model_inventory") as answer:
                data = (await answer.json())["data"]
            if data["models"]:
                break
            await asyncio.sleep(0.1)
    assert (data["models"][0]["name"], data["llm_initialized"]) == ("acestep-v15-turbo", False)
    task_id = await release(http, url, {"prompt": "takes=0.5", "audio_format": "wav"})
    async with asyncio.timeout(WITHIN_S), http.get(f"{url}/v1/jobs/{task_id}/events") as events:
        text = (await events.read()).decode()
    assert "event: succeeded" in text
    async with http.get(f"{replicas.urls[1]}/v1/jobs/{task_id}") as answer:
        assert (await answer.json())["data"]["manifest"]["task_id"] == task_id


async def test_a_chat_is_answered_with_a_song(replicas: Replicas, http: aiohttp.ClientSession) -> None:
    body = {"messages": [{"role": "user", "content": "jazz"}], "audio_config": {"format": "wav"}}
    async with asyncio.timeout(WITHIN_S), http.post(f"{replicas.urls[0]}/v1/chat/completions", json=body) as answer:
        message = (await answer.json())["choices"][0]["message"]
    assert message["audio"][0]["audio_url"]["url"].startswith("data:audio/wav;base64,UklGR")


def test_the_demos_curl_requests_make_a_song(replicas: Replicas, tmp_path: Path) -> None:
    environment = replicas.environment | {"ACESTEP_API_KEY": ""}
    with GatewayProcess(tmp_path, environment) as local:
        song = song_over_rest(local.url, tmp_path, tmp_path / "manifest.json", lambda: True)
    assert song.read_bytes().startswith(b"RIFF")
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "succeeded"


def test_it_does_not_start_open_to_others_and_names_no_key(replicas: Replicas) -> None:
    environment = clean_environment(replicas.environment)
    environment["ACESTEP_API_HOST"] = "0.0.0.0"  # noqa: S104 - it is refused
    del environment["ACESTEP_API_KEY"]
    command = [*COMMAND, "gateway"]
    ended = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert ended.returncode == 2
    assert "set ACESTEP_API_KEY" in ended.stderr
    logs = "".join(path.read_text() for path in replicas.folder.glob("gateway-*.log"))
    assert "task accepted" in logs
    assert KEY not in logs


def stored(replicas: Replicas, name: str) -> bytes:
    """An object below the prefix."""
    variables = replicas.environment
    storage = boto3.client(
        "s3",
        endpoint_url=variables["ACESTEP_S3_ENDPOINT"],
        region_name=variables["AWS_DEFAULT_REGION"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
    )
    key = f"{variables['ACESTEP_S3_PREFIX']}/{name}"
    body: bytes = storage.get_object(Bucket=variables["ACESTEP_S3_BUCKET"], Key=key)["Body"].read()
    storage.close()
    return body
