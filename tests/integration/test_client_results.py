# SPDX-License-Identifier: Apache-2.0
"""The SDK against a whole worker (without a model) and S3: ends that came before anybody asked, songs, cancellation."""

import asyncio
import json
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.client import Client, DownloadFailed, JobRejectedError, NotEndedYet, sync
from acestep_consumer.client import job as job_module
from acestep_consumer.config import settings as settings_module
from acestep_consumer.config.settings import StorageSettings
from acestep_schemas.events import JobCompleted
from tests.support.command import run_command
from tests.support.proxy import Proxy
from tests.support.servers import ManagementApi
from tests.support.waiting import WITHIN_S
from tests.support.worker import WorkerProcess

SONG = {"audio_format": "wav", "audio_duration": 10}


@pytest.fixture(scope="module")
def worker_variables(
    own_worker_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return own_worker_environment


@pytest.fixture(scope="module", autouse=True)
def light_worker(worker_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(tmp_path_factory.mktemp("light"), worker_variables, light=True) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(worker_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``Client()`` reads: as in a shell in which somebody set it."""
    monkeypatch.chdir(tmp_path)
    for name, value in worker_variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def storage(environment: None) -> StorageSettings:
    return settings_module.load().storage


@pytest.fixture
async def client(environment: None) -> AsyncIterator[Client]:
    async with Client() as ours:
        yield ours


async def sung(client: Client, **fields: Any) -> JobCompleted:
    job = await client.start({**SONG, "prompt": "bytes=300000", **fields})
    event = await job.wait(WITHIN_S)
    assert isinstance(event, JobCompleted), event
    return event


async def test_an_end_that_came_before_anybody_asked_is_found_as_it_was_told(client: Client) -> None:
    event = await sung(client)
    async with Client() as late:
        assert await late.wait(event.subject, WITHIN_S) == event


async def test_an_end_without_songs_is_found_too(client: Client, tmp_path: Path) -> None:
    job = await client.start({"prompt": "x", "task_type": "dance"})
    event = await job.wait(WITHIN_S)
    assert event.state == "rejected"
    async with Client() as late:
        assert await late.wait(job.task_id, WITHIN_S) == event
        with pytest.raises(JobRejectedError, match=r"was rejected: invalid_request: .*task_type") as no_songs:
            await late.result(job.task_id, tmp_path)
    assert (no_songs.value.event, no_songs.value.code) == (event, "invalid_request")


async def test_an_end_that_came_while_the_broker_had_dropped_our_queue_is_found(
    worker_variables: dict[str, str], storage: StorageSettings, management: ManagementApi, tmp_path: Path
) -> None:
    url = worker_variables["ACESTEP_AMQP_URL"]
    mark = tmp_path / "go"
    async with Proxy.for_url(url) as proxy, Client(proxy.url(url), storage=storage) as client, Client(url) as other:
        job = await client.start({**SONG, "prompt": f"until={mark}"})
        proxy.refuse()
        vhost = url.rpartition("/")[2]
        for queue in management.call("GET", f"/api/queues/{vhost}?columns=name"):
            if queue["name"].startswith("acestep.client."):
                management.call("DELETE", f"/api/queues/{vhost}/{queue['name']}")
        other_job = await other.job(job.task_id)
        mark.touch()
        await other_job.wait(WITHIN_S)
        proxy.heal()
        assert (await job.wait(WITHIN_S)).state == "completed"


async def test_songs_are_downloaded_whole_and_only_once(client: Client, tmp_path: Path) -> None:
    event = await sung(client, batch_size=2)
    paths = await client.result(event, tmp_path / "songs")
    assert [path.name for path in paths] == [f"{event.subject}-0.wav", f"{event.subject}-1.wav"]
    assert [path.stat().st_size for path in paths] == [audio.bytes for audio in event.data.audios]
    assert set((tmp_path / "songs").iterdir()) == set(paths)
    before = [path.stat().st_mtime_ns for path in paths]
    assert await client.result(event.subject, tmp_path / "songs") == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


async def test_the_family_of_a_job_is_read_from_storage(worker_variables: dict[str, str], client: Client) -> None:
    first = (await sung(client)).subject
    second = (await sung(client, source_task_id=first, variation=0.2)).subject
    family = await client.lineage(second)
    assert (set(family.tasks), family.first) == ({first, second}, [first])
    assert [(each.child, each.parent.field) for each in family.children_of(first)] == [(second, "variation")]
    assert (await client.lineage("nobody-s")).tasks == {"nobody-s": None}
    async with Client(worker_variables["ACESTEP_AMQP_URL"]) as poor:
        with pytest.raises(DownloadFailed, match="no access to storage"):
            await poor.lineage(first)


async def test_songs_of_earlier_jobs_are_downloaded_by_a_command_that_resumes_and_needs_no_broker(
    worker_variables: dict[str, str], client: Client, tmp_path: Path
) -> None:
    event = await sung(client, batch_size=2)
    refused = await client.start({"prompt": "x", "task_type": "dance"})
    await refused.wait(WITHIN_S)

    async def command(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        settings = worker_variables | {"ACESTEP_AMQP_URL": "amqp://127.0.0.1:1"} | variables
        return await asyncio.to_thread(run_command, "download", *arguments, "--folder", str(folder), variables=settings)

    folder = tmp_path / "new" / "songs"
    names = [f"{event.subject}-{index}.wav" for index in range(2)]
    done = await command(event.subject)
    assert (done.returncode, "error" in done.stderr) == (0, False)
    assert done.stdout.splitlines() == [str(folder / name) for name in names]
    whole = (folder / names[0]).read_bytes()
    (folder / names[0]).unlink()
    (folder / f"{names[0]}.part").write_bytes(whole[:1000])
    untouched = (folder / names[1]).stat().st_mtime_ns
    done = await command(refused.task_id, "nobody-s", event.subject)
    assert done.returncode == 1
    first, second = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert first.startswith(f"error: {refused.task_id} was rejected: invalid_request: ")
    assert second.startswith("error: nobody-s: no result: ")
    assert (folder / names[0]).read_bytes() == whole
    assert (folder / names[1]).stat().st_mtime_ns == untouched
    assert {path.name for path in folder.iterdir()} == set(names)
    done = await command(event.subject, "--json")
    assert json.loads(done.stdout) == {"task_id": event.subject, "songs": [str(folder / name) for name in names]}
    done = await command(event.subject, ACESTEP_S3_ENDPOINT="http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (4, "")
    *waiting, failed = done.stderr.splitlines()
    # A program that gets no processor for a while says nothing of a wait.
    assert waiting in ([], ["waiting for the storage (ACESTEP_S3_ENDPOINT) …"])
    assert failed.startswith("error: download failed: ")
    assert (await command("a.b")).returncode == 2


async def test_a_client_without_storage_says_what_a_download_needs(
    worker_variables: dict[str, str], client: Client, tmp_path: Path
) -> None:
    event = await sung(client)
    async with Client(worker_variables["ACESTEP_AMQP_URL"]) as poor:
        with pytest.raises(DownloadFailed, match="ACESTEP_S3_PRESIGN_SECONDS"):
            await poor.result(event, tmp_path)


async def test_without_keys_for_storage_a_job_is_waited_for_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    async with Client() as client:
        event = await sung(client)
        with pytest.raises(DownloadFailed, match="AWS_ACCESS_KEY_ID"):
            await client.result(event, tmp_path)


async def test_a_running_job_can_be_cancelled_by_another_client(client: Client, tmp_path: Path) -> None:
    job = await client.start({**SONG, "prompt": f"until={tmp_path / 'never'}"})
    async with asyncio.timeout(WITHIN_S):
        await anext(job.events())
        async with Client() as other:
            await other.cancel(job.task_id)
        assert (await job.wait()).state == "cancelled"


def test_the_same_without_async(tmp_path: Path) -> None:
    with sync.SyncClient() as client:
        job = client.start({**SONG, "prompt": "x"})
        states = [str(event.state) for event in job.events()]
        assert (states[0], states[-1]) == ("started", "completed")
        assert job.ended == job.wait() == client.wait(job.task_id, WITHIN_S)
        (path,) = job.result(tmp_path)
        assert client.result(job.task_id, tmp_path) == (path,)
        task_id = client.submit({**SONG, "prompt": "y"})
        assert client.job(task_id).wait(WITHIN_S).subject == task_id
        assert repr(job) == f"<Job {job.task_id}: completed>"
    client.close()  # once more does no harm
    with pytest.raises(sync.ClientError, match="closed"):
        client.submit(SONG)


async def test_a_wait_for_an_id_that_no_job_has_ends_once_nothing_waits_and_nothing_runs(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(job_module, "ASK_EVERY_S", 0.2)
    mark = tmp_path / "go"
    job = await client.start({**SONG, "prompt": f"until={mark}"})
    await anext(job.events())
    waiting = asyncio.create_task(client.wait("no-such-job"))
    async with asyncio.timeout(WITHIN_S):
        assert not await client.is_idle()
        mark.touch()
        await job.wait()
        with pytest.raises(NotEndedYet, match="no job no-such-job is known"):
            await waiting


def test_a_client_without_async_connects_at_its_first_call_and_may_be_used_without_with(tmp_path: Path) -> None:
    client = sync.Client("amqp://127.0.0.1:1/")  # nothing listens there, and nothing was tried yet
    with pytest.raises(sync.Unreachable), client:
        pass
    with pytest.raises(sync.Unreachable):
        client.submit(SONG)
    client.close()
    ours = sync.Client()
    try:
        assert ours.start({**SONG, "prompt": "x"}).wait(WITHIN_S).state == "completed"
    finally:
        ours.close()


def test_a_client_without_async_that_was_never_used_can_be_closed() -> None:
    client = sync.Client("amqp://127.0.0.1:1/")
    client.close()
    with pytest.raises(sync.ClientError, match="closed"):
        client.submit(SONG)


def test_a_subscription_without_async_misses_nothing_from_its_block_on() -> None:
    with sync.Client() as client, client.subscribe("job.completed.*") as events:
        (task_id,) = client.submit_many([{**SONG, "prompt": "x"}])
        event = next(events)
        assert (event.state, event.subject) == ("completed", task_id)
        first, second = client.submit_many([{**SONG, "prompt": "y"}] * 2)
        assert {next(events).subject for _ in range(2)} == {first, second}


def test_closing_the_client_inside_a_subscription_is_no_error() -> None:
    with sync.Client() as client, client.subscribe("job.#"):
        client.close()


async def test_without_async_also_where_a_loop_runs_as_in_a_notebook() -> None:
    with sync.SyncClient() as client:
        assert client.start({**SONG, "prompt": "x"}).wait(WITHIN_S).state == "completed"


def test_leaving_a_stream_without_async_ends_the_subscription() -> None:
    with sync.SyncClient() as client:
        client.start({**SONG, "prompt": "x"})
        seen = threading.Event()

        def hear() -> None:
            for event in client.stream("job.#"):
                assert event.subject
                seen.set()
                break

        hearing = threading.Thread(target=hear)
        hearing.start()
        while not seen.is_set():
            client.start({**SONG, "prompt": "x"}).wait(WITHIN_S)
        hearing.join(WITHIN_S)
        assert not hearing.is_alive()


def test_a_cancel_and_a_wait_that_is_too_short_without_async(tmp_path: Path) -> None:
    with sync.SyncClient() as client:
        job = client.start({**SONG, "prompt": f"until={tmp_path / 'never'}"})
        with pytest.raises(sync.NotEndedYet):
            job.wait(0.05)
        job.cancel()
        assert job.wait(WITHIN_S).state == "cancelled"
        with pytest.raises(sync.NoSongs):
            job.result(tmp_path)
