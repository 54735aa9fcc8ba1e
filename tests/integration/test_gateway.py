# SPDX-License-Identifier: Apache-2.0
"""The REST API as an operator runs it: two replicas, a real broker and S3, and a light worker."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
from tests.support.listening import GatewayProcess
from tests.support.node import FOLDER, ensure_modules, run_node
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import COMMAND, ROOT, WorkerProcess, clean_environment

KEY = "integration-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
WAITING = 2
POLLERS = 1_000


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


async def manifest_id(http: aiohttp.ClientSession, url: str, task_id: str) -> object:
    """The task that this job's manifest is of; None: it has no manifest yet."""
    async with http.get(f"{url}/v1/jobs/{task_id}") as answer:
        return ((await answer.json())["data"]["manifest"] or {}).get("task_id")


async def status_of(request: Any) -> int:
    async with request as answer:
        await answer.read()
        return int(answer.status)


async def becomes(wanted: object, ask: Callable[[], Awaitable[object]]) -> None:
    """Ask until this is the answer."""
    async with asyncio.timeout(WITHIN_S):
        while await ask() != wanted:  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.1)


def spooled(folder: Path) -> list[Path]:
    """Files of uploads on their way, of all replicas."""
    return list(folder.glob("acestep-*/upload-*/*"))


def form_of(content: object) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in (("task_type", "cover"), ("prompt", "a"), ("audio_format", "wav")):
        form.add_field(name, value)
    form.add_field("src_audio", content, filename="song.wav")
    return form


async def upload(http: aiohttp.ClientSession, url: str, content: object, headers: dict[str, str]) -> str:
    async with http.post(f"{url}/release_task", data=form_of(content), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["data"]["task_id"])


def waiting_of(http: aiohttp.ClientSession) -> set[Any]:
    """The connections that wait for an answer."""
    assert isinstance(http.connector, aiohttp.TCPConnector)
    return http.connector._acquired


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
    task_id = await upload(http, other, song, {})
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


async def test_a_replica_that_is_killed_in_an_upload_and_in_a_poll_costs_a_repeat_of_the_request(
    replicas: Replicas, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    gate, named = tmp_path / "gate", {"Idempotency-Key": "upload-1"}
    song = await song_of(
        http,
        replicas.urls[0],
        await end_of(http, replicas.urls[0], await release(http, replicas.urls[0], {"audio_format": "wav"})),
    )
    environment = replicas.environment | {"ACESTEP_SCRATCH_DIR": str(tmp_path)}
    doomed = GatewayProcess(tmp_path, environment)
    await asyncio.to_thread(doomed.__enter__)
    running = await release(http, doomed.url, {"prompt": f"until={gate}", "audio_format": "wav", "batch_size": 1})
    poll = asyncio.create_task(entry_of(http, doomed.url, running, wait=30))

    async def half(content: bytes) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(1 << 20)
        # Spooled so far, when it is killed: neither client nor poller gets an answer.
        await eventually(lambda: any(path.stat().st_size for path in spooled(tmp_path)), WITHIN_S)
        doomed.process.kill()
        yield content

    with pytest.raises(aiohttp.ClientError):
        await upload(http, doomed.url, half(song), named)
    with pytest.raises(aiohttp.ClientError):
        await poll
    assert len(spooled(tmp_path)) == 1
    # A load balancer sends both to another replica. The next one on that machine cleans up what the killed one left.
    uploaded = [await upload(http, url, song, named) for url in replicas.urls]
    assert uploaded[0] == uploaded[1]
    going_on = asyncio.create_task(end_of(http, replicas.urls[1], running))
    await asyncio.to_thread(gate.touch)
    assert (await going_on)["status"] == 1
    assert (await end_of(http, replicas.urls[0], uploaded[0]))["status"] == 1
    assert stored(replicas, f"uploads/{uploaded[0]}/src_audio_path.wav") == song
    doomed.__exit__(AssertionError, None, None)
    with GatewayProcess(tmp_path, environment):
        assert spooled(tmp_path) == []


async def test_a_thousand_clients_wait_for_a_task_at_the_same_time(replicas: Replicas, tmp_path: Path) -> None:
    url, gate = replicas.urls[1], tmp_path / "gate"
    async with aiohttp.ClientSession(headers=AUTHORIZED, connector=aiohttp.TCPConnector(limit=0)) as http:
        task_id = await release(http, url, {"prompt": f"until={gate}", "audio_format": "wav", "batch_size": 1})
        polls = [asyncio.create_task(entry_of(http, url, task_id, wait=60)) for _ in range(POLLERS)]
        async with asyncio.timeout(WITHIN_S):
            await eventually(lambda: len(waiting_of(http)) >= POLLERS, WITHIN_S)
            async with http.get(f"{url}/health") as answer:  # others are served meanwhile
                assert answer.status == 200
            await asyncio.to_thread(gate.touch)
            entries = await asyncio.gather(*polls)
    assert [entry["status"] for entry in entries] == [1] * POLLERS


async def test_without_broker_or_storage_it_says_so_at_once_and_goes_on_after(
    own_rabbitmq: RabbitMQ, own_s3: SeaweedFS, tmp_path: Path
) -> None:
    environment = Environment.of(own_rabbitmq.amqp_url, own_s3).variables() | {"ACESTEP_API_KEY": KEY}
    with WorkerProcess(tmp_path, environment, light=True), GatewayProcess(tmp_path, environment) as gateway:
        async with aiohttp.ClientSession(headers=AUTHORIZED, timeout=aiohttp.ClientTimeout(30)) as http:
            url = gateway.url
            first = await release(http, url, {"prompt": "a", "audio_format": "wav"})
            done = await end_of(http, url, first)
            file = json.loads(done["result"])[0]["file"]

            await asyncio.to_thread(own_s3.kill)
            form = form_of(b"RIFF")
            requests = http.get(f"{url}{file}"), http.post(f"{url}/release_task", data=form)
            assert await asyncio.gather(*map(status_of, requests)) == [502, 503]
            assert (await entry_of(http, url, first))["status"] == 1
            assert (await entry_of(http, url, str(uuid.uuid4())))["result"] == "[]"
            waiting = await release(http, url, {"prompt": "a", "audio_format": "wav"})
            await asyncio.to_thread(own_s3.start)
            assert (await end_of(http, url, waiting))["status"] == 1
            assert await status_of(http.get(f"{url}{file}")) == 200

            await asyncio.to_thread(own_rabbitmq.kill)
            await becomes(503, lambda: status_of(http.get(f"{url}/readyz")))
            async with http.post(f"{url}/release_task", json={"prompt": "a"}) as answer:
                assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (503, True)
            assert await status_of(http.get(f"{url}/health")) == 200
            assert (await entry_of(http, url, waiting))["status"] == 1
            await asyncio.to_thread(own_rabbitmq.start)
            assert (await end_of(http, url, await release(http, url, {"audio_format": "wav"})))["status"] == 1


async def test_keys_are_read_again_at_sighup_and_the_page_takes_the_same(replicas: Replicas, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    environment = {**replicas.environment, "ACESTEP_API_KEY_FILE": str(keys), "ACESTEP_API_PAGE": "true"}
    del environment["ACESTEP_API_KEY"]

    async def allowed(http: aiohttp.ClientSession, key: str) -> tuple[bool, bool]:
        api = await status_of(http.get(f"{url}/v1/stats", headers={"Authorization": f"Bearer {key}"}))
        page = await status_of(http.get(f"{url}/", headers={"Authorization": aiohttp.encode_basic_auth("me", key)}))
        return api == 200, page == 200

    with GatewayProcess(tmp_path, environment) as process:
        url = process.url
        async with aiohttp.ClientSession() as http, asyncio.timeout(WITHIN_S):
            assert (await allowed(http, "old"), await allowed(http, "new")) == ((True, True), (False, False))
            keys.write_text("new\n")
            os.kill(process.process.id.pid, signal.SIGHUP)
            await becomes((True, True), lambda: allowed(http, "new"))
            assert await allowed(http, "old") == (False, False)
            # Without any key everybody would be let in: the present ones stay.
            keys.write_text("")
            os.kill(process.process.id.pid, signal.SIGHUP)
            await eventually(lambda: "not reloaded" in process.log.read_text(), WITHIN_S)
            assert (await allowed(http, "new"), await allowed(http, "")) == ((True, True), (False, False))


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
    # The other replica hears of it by an event of its own.
    await becomes(task_id, lambda: manifest_id(http, replicas.urls[1], task_id))


async def test_a_chat_is_answered_with_a_song(replicas: Replicas, http: aiohttp.ClientSession) -> None:
    body = {"messages": [{"role": "user", "content": "jazz"}], "audio_config": {"format": "wav"}}
    async with asyncio.timeout(WITHIN_S), http.post(f"{replicas.urls[0]}/v1/chat/completions", json=body) as answer:
        message = (await answer.json())["choices"][0]["message"]
    assert message["audio"][0]["audio_url"]["url"].startswith("data:audio/wav;base64,UklGR")


def test_openais_own_client_lists_models_and_hears_songs_whole_and_streamed(replicas: Replicas) -> None:
    ensure_modules()
    ended = run_node(FOLDER / "chat_with_openai.mjs", GATEWAY=replicas.urls[0], KEY=KEY)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["models"] == ["acestep/acestep-v15-turbo"]
    wav = "data:audio/wav;base64,UklGR"
    assert found["chat"]["id"].startswith("chatcmpl-")
    assert (found["chat"]["song"].startswith(wav), found["chat"]["finish"]) == (True, "stop")
    assert (found["stream"]["song"].startswith(wav), found["stream"]["finish"]) == (True, "stop")
    assert "la la" in found["stream"]["text"]
    assert found["refused"] == 401


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
