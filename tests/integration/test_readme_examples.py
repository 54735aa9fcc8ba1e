# SPDX-License-Identifier: Apache-2.0
"""The documentation's programs, as printed, against a real broker, store and worker."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.client import Client
from infra.local.s3 import REGION, SeaweedFS
from tests.support.broker import broker_settings
from tests.support.listening import GatewayProcess
from tests.support.node import ensure_modules, run_node
from tests.support.readme import examples
from tests.support.waiting import WITHIN_S
from tests.support.worker import ROOT, WorkerProcess, clean_environment

EXAMPLES = examples()
WITH_EVENTS = ("sdk.py", "sdk_async.py", "plain_pika.py", "node.mjs")
IN_A_FOLDER = ("sdk.py", "sdk_async.py", "migrated.py")


def run_example(name: str, folder: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Write an example to ``folder`` and run it there, as somebody would who copied it."""
    path = folder / name
    path.write_text(EXAMPLES[name], encoding="utf-8")
    if path.suffix == ".mjs":
        (folder / "node_modules").symlink_to(ensure_modules())
        return run_node(path, **environment)
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        env=clean_environment(environment | {"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


@pytest.fixture(scope="module")
def with_a_worker(
    own_worker_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Settings of a worker that waits a second for jobs to batch: each song takes long enough for progress."""
    slow = own_worker_environment | {"ACESTEP_PACK_WAIT_MS": "1000"}
    with WorkerProcess(tmp_path_factory.mktemp("worker"), slow):
        yield own_worker_environment


def test_each_example_of_the_documentation_is_run_here() -> None:
    assert set(EXAMPLES) == {*WITH_EVENTS, "migrated.py", "repaint.py", "repaint.sh"}


@pytest.mark.parametrize("name", WITH_EVENTS)
def test_it_hears_progress_and_gets_its_song(
    name: str, with_a_worker: dict[str, str], s3: SeaweedFS, tmp_path: Path
) -> None:
    done = run_example(name, tmp_path, with_a_worker)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    states = [line.split()[0] for line in lines[:-1]]
    assert states[0] == "started"
    assert states[-1] == "completed"
    assert "progress" in states
    assert any("%" in line for line in lines)
    song = lines[-1]
    size = (tmp_path / song).stat().st_size if name in IN_A_FOLDER else size_in_storage(s3, song)
    assert size > 1000


def test_ten_lines_for_the_rest_api_become_a_few_that_get_their_song(
    with_a_worker: dict[str, str], tmp_path: Path
) -> None:
    done = run_example("migrated.py", tmp_path, with_a_worker)
    assert done.returncode == 0, done.stdout + done.stderr
    (song,) = done.stdout.splitlines()
    assert (tmp_path / song).stat().st_size > 1000


def test_a_part_of_a_song_with_times_is_made_anew_by_its_id(with_a_worker: dict[str, str], tmp_path: Path) -> None:
    done = run_example("repaint.py", tmp_path, with_a_worker)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, song, parent = done.stdout.splitlines()
    assert [line.partition("  ")[2] for line in lines] == ["[Verse]", "la la la", "shine on me"]
    assert parent.startswith("from song 0 of ")
    (stem, _), beside = song.split("."), {path.name for path in (tmp_path / "songs").iterdir()}
    assert beside == {Path(f"{stem}.{suffix}").name for suffix in ("mp3", "lrc", "vtt")}


@pytest.fixture(scope="module")
def with_a_gateway(
    with_a_worker: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a gateway with a key, and the environment of those who use it."""
    environment = with_a_worker | {"ACESTEP_API_KEY": "secret"}
    with GatewayProcess(tmp_path_factory.mktemp("gateway"), environment) as gateway:
        yield gateway.url, environment


def run_in_a_shell(url: str, environment: dict[str, str], folder: Path) -> "subprocess.CompletedProcess[str]":
    script = EXAMPLES["repaint.sh"].replace("localhost:8001", url)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


def test_the_same_is_done_over_rest_in_a_shell(with_a_gateway: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = run_in_a_shell(*with_a_gateway, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, first, other = done.stdout.splitlines()
    assert [line.partition("  ")[2] for line in lines] == ["[Verse]", "la la la", "shine on me"]
    assert (first, other) == ("text2music", "repaint")
    assert (tmp_path / "take.vtt").read_text().startswith("WEBVTT")
    assert (tmp_path / "repainted.mp3").stat().st_size > 1000


def test_in_a_shell_it_ends_where_the_gateway_refuses(
    with_a_gateway: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    url, environment = with_a_gateway
    done = run_in_a_shell(url, environment | {"ACESTEP_API_KEY": "wrong"}, tmp_path)
    assert done.returncode != 0
    assert "401" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITH_EVENTS)
async def test_it_says_that_the_queue_is_full(
    name: str, service_environment: dict[str, str], amqp_url: str, tmp_path: Path
) -> None:
    async with BrokerConnection(broker_settings(amqp_url, queue_maxsize=1), "test"), Client(amqp_url) as client:
        await client.submit({"prompt": "first"})
        done = run_example(name, tmp_path, service_environment)
    assert done.returncode == 1
    assert "the queue is full, try again" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def size_in_storage(s3: SeaweedFS, uri: str) -> int:
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name=REGION,
    )
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    size: int = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
    return size
