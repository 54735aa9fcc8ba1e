# SPDX-License-Identifier: Apache-2.0
"""Secrets stay where they are: a real worker at its most talkative, and everything that it says searched for them.

Excepted are the signatures of presigned URLs, which are made to be handed out, and what a message itself says.
"""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import boto3
import pytest

from acestep_consumer.client import Client
from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.storage.s3.objects import S3Objects
from acestep_schemas.events import TerminalEvent
from tests.support.broker import API_POLL_S, Peer, until
from tests.support.command import run_command
from tests.support.engine_double import write_song
from tests.support.waiting import WITHIN_S
from tests.support.worker import WorkerProcess, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from infra.local.rabbitmq import RabbitMQ
    from infra.local.s3 import SeaweedFS
    from tests.support.servers import ManagementApi

ENDS_WITHIN_S = WITHIN_S
EVERYTHING = {"configure": ".*", "write": ".*", "read": ".*"}


@dataclass
class Login:
    """A user of the broker with a password that is recognised wherever it turns up."""

    name: str
    password: str = field(default_factory=lambda: f"sesame/{uuid.uuid4().hex}@+")

    def in_url(self, url: str) -> str:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=f"{self.name}:{quote(self.password, safe='')}@{host}").geturl()

    @property
    def forms(self) -> set[str]:
        """The password as it stands, in a URL, and as the wire has it."""
        plain, basic = f"\0{self.name}\0{self.password}", f"{self.name}:{self.password}"
        encoded = {base64.b64encode(text.encode()).decode() for text in (self.password, plain, basic)}
        return {self.password, quote(self.password), quote(self.password, safe=""), *encoded}


@pytest.fixture
def logins(management: ManagementApi, own_worker_environment: dict[str, str]) -> Iterator[tuple[Login, Login]]:
    """One for AMQP, one for the management API."""
    vhost = urlsplit(own_worker_environment["ACESTEP_AMQP_URL"]).path[1:]
    made = Login(f"worker-{uuid.uuid4().hex[:8]}"), Login(f"operator-{uuid.uuid4().hex[:8]}")
    for login, tags in zip(made, ("", "policymaker"), strict=True):
        management.call("PUT", f"/api/users/{login.name}", {"password": login.password, "tags": tags})
        management.call("PUT", f"/api/permissions/{vhost}/{login.name}", EVERYTHING)
    yield made
    for login in made:
        management.call("DELETE", f"/api/users/{login.name}")


def page(worker: WorkerProcess, path: str) -> str:
    """One of the worker's pages, whatever its status."""
    address = f"http://127.0.0.1:{worker._claim.ports[0]}{path}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return f"{answer.headers} {answer.read().decode()}"
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.headers} {error.read().decode()}"


async def end_of(client: Client, peer: Peer, body: bytes, task_id: str) -> None:
    """Send these bytes and wait until their job has ended."""
    async with asyncio.timeout(ENDS_WITHIN_S), client.subscribe(f"job.*.{task_id}") as events:
        await peer.request(body, message_id=task_id)
        async for event in events:
            if isinstance(event, TerminalEvent):
                return


async def everything_in(peer: Peer, queue: str) -> str:
    """All messages that wait in a queue: bodies, properties, headers."""
    found = []
    while await peer.ready(queue):
        message = await peer.take(queue)
        found.append(f"{message.body!r} {message.info()} {message.headers}")
    return "\n".join(found)


def stored(s3: SeaweedFS, prefix: str) -> str:
    """All text that lies in the bucket below ``prefix``, and the metadata of all objects."""
    client = boto3.client(
        "s3", endpoint_url=s3.endpoint, aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )  # fmt: skip
    found = []
    for entry in client.list_objects_v2(Bucket=s3.bucket, Prefix=f"{prefix}/").get("Contents", ()):
        answer = client.get_object(Bucket=s3.bucket, Key=entry["Key"])
        found.append(f"{entry['Key']} {answer['Metadata']} {answer['Body'].read().decode(errors='replace')}")
    return "\n".join(found)


async def test_no_secret_is_in_anything_that_a_worker_says_at_its_most_talkative(
    own_worker_environment: dict[str, str],
    logins: tuple[Login, Login],
    rabbitmq: RabbitMQ,
    management: ManagementApi,
    s3: SeaweedFS,
    tmp_path: Path,
) -> None:
    ours, operator = logins
    url = own_worker_environment["ACESTEP_AMQP_URL"]
    vhost, prefix = urlsplit(url).path[1:], own_worker_environment["ACESTEP_S3_PREFIX"]
    hub_token = f"hf_{uuid.uuid4().hex}"
    environment = own_worker_environment | {
        "ACESTEP_AMQP_URL": ours.in_url(url),
        "ACESTEP_MANAGEMENT_URL": operator.in_url(rabbitmq.management_url),
        "ACESTEP_LOG_LEVEL": "debug",
        "ACESTEP_S3_PRESIGN_SECONDS": "60",
        "HF_TOKEN": hub_token,
    }
    song = tmp_path / "source.wav"
    write_song(song, seed=1, seconds=11)
    boto3.client(
        "s3", endpoint_url=s3.endpoint, aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    ).upload_file(str(song), s3.bucket, f"{prefix}/source.wav")  # fmt: skip
    bodies: list[dict[str, Any]] = [
        {"prompt": "jazz", "task_type": "cover", "src_audio_path": f"s3://{s3.bucket}/{prefix}/source.wav",
         "inference_steps": 1, "audio_format": "flac"},
        {"task_type": "cover", "src_audio_path": f"s3://{s3.bucket}/{prefix}/none.wav"},
        {"task_type": "cover", "src_audio_path": "https://localhost/a.wav"},
        {"task_type": "dance"},
    ]  # fmt: skip
    (tmp_path / "worker").mkdir()
    async with (
        running(WorkerProcess(tmp_path / "worker", environment)) as worker,
        Peer(url) as peer,
        Client(url) as client,
    ):
        events = await peer.subscribe("#")
        for number, body in enumerate(bodies):
            await end_of(client, peer, json.dumps(body).encode(), f"secret-{number}")
        await peer.request(b"{", message_id="malformed")
        management.call("DELETE", f"/api/connections/{quote(await connection_of(management, vhost, ours), safe='')}")
        await until(lambda: asyncio.to_thread(reconnected, worker), "a second connection", ENDS_WITHIN_S)
        said = {path: await asyncio.to_thread(page, worker, path) for path in ("/metrics", "/healthz", "/readyz", "/")}
        said["events"] = await everything_in(peer, events)
    async with Peer(url) as peer:
        said["dead letters"] = await everything_in(peer, "acestep.dead-letter")
        said["unrouted"] = await everything_in(peer, "acestep.events.unrouted")
    said["log"] = worker.log.read_text()
    said["bucket"] = await asyncio.to_thread(stored, s3, prefix)
    assert "manifest.json" in said["bucket"]
    assert "X-Amz-Signature" in said["events"]
    assert all(task in said["dead letters"] for task in ("secret-1", "secret-2", "secret-3", "malformed"))
    assert '"reason"' in said["log"], "the worker has something to say about each of these jobs"
    secrets = ours.forms | operator.forms | {s3.secret_key, quote(s3.secret_key), hub_token}
    assert {where: secret for where, text in said.items() for secret in secrets if secret in text} == {}


async def connection_of(management: ManagementApi, vhost: str, login: Login) -> str:
    """The name of one of the worker's connections; the broker lists a new one some seconds late."""
    found: list[str] = []

    async def listed() -> bool:
        connections = await asyncio.to_thread(
            management.call, "GET", f"/api/vhosts/{quote(vhost, safe='')}/connections"
        )
        found.extend(each["name"] for each in connections if each.get("user") == login.name)
        return bool(found)

    await until(listed, "the worker's connection", every_s=API_POLL_S)
    return found[0]


def reconnected(worker: WorkerProcess) -> bool:
    return "broker connection lost" in worker.log.read_text() and worker.get("/readyz")[0] == 200


@pytest.mark.parametrize("command", [["run"], ["dead", "list"], ["topology", "--declare"], ["watch"]], ids=" ".join)
def test_no_command_repeats_a_password_that_the_broker_refuses(
    own_worker_environment: dict[str, str], rabbitmq: RabbitMQ, command: list[str]
) -> None:
    wrong = Login("nobody")
    environment = own_worker_environment | {
        "ACESTEP_AMQP_URL": wrong.in_url(rabbitmq.amqp_url),
        "ACESTEP_LOG_LEVEL": "debug",
        "ACESTEP_HTTP_PORT": "0",
    }
    done = run_command(*command, variables=environment)
    assert done.returncode in {2, 4}, done.stderr
    assert "user and the password" in done.stderr.replace("\n", " ") or "ACESTEP_AMQP_URL" in done.stderr
    assert not [secret for secret in wrong.forms if secret in done.stdout + done.stderr]


async def test_the_keys_for_s3_may_lie_in_a_file(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_prefix: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "keys").write_text(
        f"[default]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    settings = StorageSettings(endpoint=s3.endpoint, bucket=s3.bucket)
    async with S3Objects(settings, retry_s=5) as objects:
        assert await objects.head(ObjectAddress(s3.bucket, f"{s3_prefix}/none")) is None
