# SPDX-License-Identifier: Apache-2.0
"""The page's server: against a real broker, a real S3 and a light worker, with what a browser would send."""

import asyncio
import hashlib
import io
import json
import re
import subprocess
import zipfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aio_pika
import aiohttp
import pytest
from rich.console import Console

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import tier_queue
from acestep_consumer.commands.listen import _QueuePoll
from acestep_consumer.config.settings import Settings, load
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_consumer.webui.job_board import QueueState
from acestep_schemas import examples
from infra.local.s3 import SeaweedFS
from tests.support.broker import Peer
from tests.support.command import run_command
from tests.support.listening import (
    RUNNING,
    WAITING,
    Listening,
    ListenProcess,
    PageClient,
    listening,
    made,
    publish_events,
)
from tests.support.waiting import WITHIN_S, eventually

__all__ = ["listening"]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


@pytest.fixture
def page_client(listening: Listening, http: aiohttp.ClientSession) -> PageClient:
    return PageClient(listening.url, http)


async def forge(listening: Listening, task_id: str, **audio: object) -> None:
    """Publish a ``completed`` event that names another object, as whoever may publish events could."""
    await publish_events(listening, made(task_id, examples.completed().data.audios[0].model_copy(update=audio)))


async def test_the_page_comes_from_here_alone_and_says_so_to_the_browser(page_client: PageClient) -> None:
    for path, kind in {"/": "text/html", "/style.css": "text/css", "/page.js": "text/javascript"}.items():
        async with page_client.http.get(page_client.url + path) as answer:
            text = await answer.text()
            assert (answer.status, answer.content_type) == (200, kind)
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert re.findall(r"https?://[^\"'\s]+", text) == []
            assert "innerHTML" not in text
            assert " style=" not in text


async def test_a_job_is_told_of_from_order_to_song(page_client: PageClient, tmp_path: Path) -> None:
    prompt = f"slow jazz until={tmp_path / 'seen'}"
    task_id = await page_client.submit(prompt=prompt, audio_format="wav", seed="5", audio_duration=30)
    seen: list[str] = []
    async with asyncio.timeout(WITHIN_S), page_client.updates() as batches:
        async for _, batch in batches:
            cards = [card for card in batch["cards"] if card["task_id"] == task_id]
            seen += [card["state"] for card in cards]
            if "running" in seen:
                (tmp_path / "seen").touch()
            if "completed" in seen:
                break
    (card,) = cards
    assert "running" in seen
    assert card["request"]["prompt"] == prompt
    (song,) = card["songs"]
    assert (song["seed"], song["name"]) == ("5", f"{task_id}-0.wav")


async def test_a_file_of_the_readers_own_is_the_source_of_a_song(page_client: PageClient) -> None:
    first = await page_client.submit(prompt="bytes=300000")
    await page_client.until(first, "completed")
    http, url = page_client.http, page_client.url
    async with http.get(f"{url}/audio/{first}/0") as answer:
        song = await answer.read()
    async with http.post(f"{url}/uploads", params={"name": "mine.wav"}, data=song, headers={"Origin": url}) as answer:
        assert answer.status == 201
        address = (await answer.json())["address"]
    task_id = await page_client.submit(prompt="as jazz", task_type="cover", src_audio_path=address)
    card = await page_client.until(task_id, "completed")
    assert card["request"]["src_audio_path"] == address


async def test_a_song_is_sent_whole_in_ranges_and_not_twice(page_client: PageClient) -> None:
    task_id = await page_client.submit(prompt="bytes=300000")
    size = (await page_client.until(task_id, "completed"))["songs"][0]["bytes"]
    url = f"{page_client.url}/audio/{task_id}/0"
    async with page_client.http.get(url) as answer:
        song = await answer.read()
        tag = answer.headers["ETag"]
        assert (answer.status, answer.content_type, len(song)) == (200, "audio/wav", size)
    assert tag == f'"{hashlib.sha256(song).hexdigest()}"'
    for asked, first, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=1000-", 1000, size),
        ("bytes=-50", size - 50, size),
        (f"bytes=10-{size * 2}", 10, size),
    ):
        async with page_client.http.get(url, headers={"Range": asked}) as answer:
            assert await answer.read() == song[first:stop], asked
            assert answer.status == 206
            assert answer.headers["Content-Range"] == f"bytes {first}-{stop - 1}/{size}"
    async with page_client.http.get(url, headers={"Range": f"bytes={size}-"}) as answer:
        assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
    async with page_client.http.get(url, headers={"If-None-Match": tag}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")
    async with page_client.http.get(url, headers={"Range": "bytes=0-9", "If-Range": '"another"'}) as answer:
        assert (answer.status, await answer.read()) == (200, song)
    async with page_client.http.head(url) as answer:
        assert (answer.status, answer.content_length) == (200, size)
    async with page_client.http.get(url + "?download") as answer:
        assert answer.headers["Content-Disposition"] == f'attachment; filename="{task_id}-0.wav"'


async def test_all_songs_come_from_storage_as_one_archive(page_client: PageClient) -> None:
    made = [await page_client.submit(prompt=f"bytes={size}") for size in (300_000, 900_000)]
    views = {task_id: await page_client.until(task_id, "completed") for task_id in made}
    async with page_client.updates() as updates:
        cursor, _ = await anext(updates)
    numbers = ".".join(str(view["number"]) for view in views.values())
    async with page_client.http.get(
        f"{page_client.url}/songs.zip?board={cursor.split('-')[0]}&jobs={numbers}"
    ) as answer:
        assert (answer.status, answer.content_type) == (200, "application/zip")
        with zipfile.ZipFile(io.BytesIO(await answer.read())) as archive:
            assert archive.testzip() is None
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert sizes == {f"{task_id}-0.wav": view["songs"][0]["bytes"] for task_id, view in views.items()}


@pytest.mark.parametrize("path", ["/audio/never-heard-of/0", "/audio/%2e%2e/0", "/audio/a/b/0", "/audio/x/-1"])
async def test_there_is_no_song_where_no_job_left_one(page_client: PageClient, path: str) -> None:
    async with page_client.http.get(page_client.url + path) as answer:
        assert answer.status == 404


async def test_an_event_cannot_make_the_page_hand_out_other_objects(
    page_client: PageClient, listening: Listening
) -> None:
    theirs = await page_client.submit(prompt="a secret")
    await page_client.until(theirs, "completed")
    bucket, prefix = listening.environment["ACESTEP_S3_BUCKET"], listening.environment["ACESTEP_S3_PREFIX"]
    for number, uri in enumerate(
        (
            f"s3://{bucket}/{prefix}/{theirs}/manifest.json",
            f"s3://{bucket}/{prefix}/forged-1/../{theirs}/0.wav",
            f"s3://elsewhere/{prefix}/forged-2/0.wav",
            "http://127.0.0.1/forged-3",
        )
    ):
        await forge(listening, f"forged-{number}", uri=uri)
        await page_client.until(f"forged-{number}", "completed")
        async with page_client.http.get(f"{page_client.url}/audio/forged-{number}/0") as answer:
            assert answer.status == 403, uri


async def test_a_song_that_is_gone_is_said_to_be(page_client: PageClient, listening: Listening) -> None:
    folder = f"s3://{listening.environment['ACESTEP_S3_BUCKET']}/{listening.environment['ACESTEP_S3_PREFIX']}"
    await forge(listening, "gone", uri=f"{folder}/gone/0.wav")
    await page_client.until("gone", "completed")
    async with page_client.http.get(f"{page_client.url}/audio/gone/0") as answer:
        assert (answer.status, "was deleted" in await answer.text()) == (404, True)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", ""])
async def test_another_site_in_the_same_browser_can_order_nothing(page_client: PageClient, origin: str) -> None:
    for path in ("/jobs", "/jobs/x/cancel", "/jobs/x/show"):
        assert (await page_client.post(path, {"prompt": "x"}, origin=origin))[0] == 403


async def test_a_name_that_was_pointed_here_gets_no_answer(page_client: PageClient) -> None:
    for path in ("/", "/events", "/audio/x/0"):
        async with page_client.http.get(page_client.url + path, headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
            assert "--name" in await answer.text()


async def test_a_form_that_a_foreign_page_can_send_is_no_order(page_client: PageClient) -> None:
    headers = {"Origin": page_client.url, "Content-Type": "text/plain"}
    async with page_client.http.post(page_client.url + "/jobs", data='{"prompt": "x"}', headers=headers) as answer:
        assert answer.status == 415


async def test_a_wrong_order_is_answered_with_every_field_and_shown_to_nobody(page_client: PageClient) -> None:
    status, answer = await page_client.post(
        "/jobs", {"task_id": "wrong", "prompt": "x", "seed": "y", "audio_duration": "z"}
    )
    assert status == 422
    assert {problem["field"] for problem in answer["error"]["fields"]} == {"seed", "audio_duration"}
    assert (await page_client.post("/jobs/wrong/cancel"))[0] == 404


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 20_000, b"\xff", b"", b"{"])
async def test_an_order_that_is_no_json_or_too_deep_is_answered_with_400(page_client: PageClient, body: bytes) -> None:
    headers = {"Origin": page_client.url, "Content-Type": "application/json"}
    async with page_client.http.post(page_client.url + "/jobs", data=body, headers=headers) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "not_json"


async def test_an_order_that_is_too_large_is_not_read(page_client: PageClient) -> None:
    assert (await page_client.post("/jobs", {"prompt": "x" * 300_000}))[0] == 413


async def test_a_full_queue_is_said_with_the_time_to_wait_and_running_and_waiting_jobs_can_be_stopped(
    page_client: PageClient, tmp_path: Path
) -> None:
    never = f"until={tmp_path / 'never'}"
    running = [await page_client.submit(prompt=never) for _ in range(RUNNING)]
    for task_id in running:
        await page_client.until(task_id, "running")
    waiting = [await page_client.submit(prompt=never) for _ in range(WAITING)]
    try:
        body = {"task_id": "one-too-many", "prompt": "x"}
        async with page_client.http.post(
            page_client.url + "/jobs", json=body, headers={"Origin": page_client.url}
        ) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (503, "queue_full")
            assert error["retry_after_s"] == int(answer.headers["Retry-After"]) > 0
        assert (await page_client.post("/jobs/one-too-many/cancel"))[0] == 404
    finally:
        for task_id in (*waiting, *running):
            assert (await page_client.post(f"/jobs/{task_id}/cancel"))[0] == 202
    for task_id in (*running, *waiting):
        card = await page_client.until(task_id, "cancelled")
        assert (card["stopping"], card["error"]["code"]) == (False, "cancelled")


async def test_a_page_that_comes_back_hears_only_what_is_new(page_client: PageClient) -> None:
    first = await page_client.submit(prompt="one")
    await page_client.until(first, "completed")
    async with page_client.updates() as batches:
        mark, everything = await anext(batches)
    assert everything["fresh"]
    second = await page_client.submit(prompt="two")
    await page_client.until(second, "completed")
    async with page_client.updates(mark) as batches:
        _, batch = await anext(batches)
    assert (batch["fresh"], [card["task_id"] for card in batch["cards"]]) == (False, [second])


async def test_a_page_that_was_hidden_comes_back_with_what_it_has_seen(page_client: PageClient) -> None:
    await page_client.until(await page_client.submit(prompt="one"), "completed")
    async with page_client.updates() as batches:
        mark, _ = await anext(batches)
    second = await page_client.submit(prompt="two")
    await page_client.until(second, "completed")
    async with page_client.updates(query=f"?since={mark}") as batches:
        _, batch = await anext(batches)
    assert (batch["fresh"], [card["task_id"] for card in batch["cards"]]) == (False, [second])


async def test_nothing_that_a_browser_gets_holds_a_password_a_key_or_an_address_of_storage(
    page_client: PageClient, listening: Listening
) -> None:
    task_id = await page_client.submit(prompt="a secret")
    got = json.dumps(await page_client.until(task_id, "completed"))
    for path in ("/", "/page.js", f"/audio/{task_id}/0", "/audio/never/0"):
        async with page_client.http.get(page_client.url + path) as answer:
            got += f"{dict(answer.headers)}{await answer.read()!r}"
    for name in ("ACESTEP_AMQP_URL", "ACESTEP_S3_ENDPOINT", "AWS_SECRET_ACCESS_KEY"):
        assert listening.environment[name] not in got
    assert "X-Amz" not in got


async def test_jobs_of_other_producers_show_up_too(page_client: PageClient, listening: Listening) -> None:
    done = await asyncio.to_thread(
        run, listening.environment, "submit", "--prompt", "elsewhere", "--format", "wav", "--wait", "--json"
    )
    task_id = json.loads(done.stdout)["subject"]
    assert (await page_client.until(task_id, "completed"))["request"]["prompt"] == "elsewhere"


async def test_after_a_restart_earlier_songs_are_found_by_their_id(
    page_client: PageClient, listening: Listening, tmp_path: Path
) -> None:
    task_id = await page_client.submit(prompt="yesterday")
    await page_client.until(task_id, "completed")
    with ListenProcess(tmp_path, listening.environment) as page:
        later = PageClient(page.url, page_client.http)
        async with later.http.get(f"{later.url}/audio/{task_id}/0", headers={"Range": "bytes=0-3"}) as answer:
            assert (answer.status, await answer.read()) == (206, b"RIFF")
        assert (await later.post("/jobs/never-heard-of/show"))[0] == 404
        assert await later.post(f"/jobs/{task_id}/show") == (200, {"task_id": task_id})
        assert (await later.until(task_id, "completed"))["request"]["prompt"] == "yesterday"


async def test_what_waits_for_larger_cards_counts_as_waiting_where_requests_are_sent_on(amqp_url: str) -> None:
    plain = load({"ACESTEP_AMQP_URL": amqp_url}, env_file=None)
    routed = load({"ACESTEP_AMQP_URL": amqp_url, "ACESTEP_ROUTE_BY_TIER": "true"}, env_file=None)
    async with BrokerConnection(plain.broker, "test") as link, Peer(amqp_url) as peer:
        await peer.request(b"{}")
        assert await looked(routed) == QueueState(
            broker=True, waiting=1, workers=0
        )  # no worker has declared the tiers' queues
        for tier in BUILT_IN.tiers:
            await link.declare_tier_queue(tier.name)
        for tier in (BUILT_IN.tiers[1], BUILT_IN.tiers[-1]):
            await peer.channel.default_exchange.publish(aio_pika.Message(b"{}"), tier_queue(tier.name), timeout=10)
        assert await looked(routed) == QueueState(broker=True, waiting=3, workers=0)
        assert await looked(plain) == QueueState(broker=True, waiting=1, workers=0)


async def looked(settings: Settings) -> QueueState:
    glance = _QueuePoll(settings, Console(file=io.StringIO()))
    try:
        return await glance()
    finally:
        await glance.close()


async def test_sigterm_ends_it_at_once_while_pages_look(
    page_client: PageClient, listening: Listening, tmp_path: Path
) -> None:
    with ListenProcess(tmp_path, listening.environment) as page:
        other = PageClient(page.url, page_client.http)
        async with other.updates() as batches, aclosing(batches):  # type: ignore[type-var]
            await anext(batches)
            page.process.id.end(grace_s=10)
            await eventually(lambda: not page.process.running())
            with pytest.raises((StopAsyncIteration, aiohttp.ClientError)):
                await anext(batches)
        assert page.process.returncode() == 0, page.log.read_text()
        assert "Traceback" not in page.log.read_text()


def test_without_a_broker_it_says_so(s3: SeaweedFS, listening: Listening) -> None:
    nobody = listening.environment | {"ACESTEP_AMQP_URL": "amqp://guest:guest@127.0.0.1:9/"}
    done = run(nobody, "listen", "--port", "0")
    assert (done.returncode, done.stdout) == (4, "")
    assert "ACESTEP_AMQP_URL" in done.stderr


def test_a_port_that_is_taken_is_named_with_the_way_out(listening: Listening) -> None:
    done = run(listening.environment, "listen", "--port", listening.url.rpartition(":")[2])
    assert done.returncode == 2
    assert "--port 0" in done.stderr


def test_a_page_for_others_comes_with_a_warning(listening: Listening, tmp_path: Path) -> None:
    for_all, for_us = ("--host", "0.0.0.0", "--port", "0"), ()  # noqa: S104 - that is the point
    for arguments, warned in ((for_all, True), (for_us, False)):
        with ListenProcess(tmp_path, listening.environment, *arguments) as page:
            pass  # what it prints after its address is in the log when it has ended
        assert ("there is no login" in " ".join(page.log.read_text().split())) is warned


def run(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_command(*arguments, variables=environment)
