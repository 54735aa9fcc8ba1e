# SPDX-License-Identifier: Apache-2.0
"""TLS to broker, management API and storage: verified, with one's own authority where need be, and never given up.

Each server here has a certificate of an authority that no system knows. Who is told of it gets in; who is not, or is
told of another, is refused with what to change, and sends nothing that is not TLS.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
import pytest
from pydantic import SecretStr

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import BrokerError, BrokerRefused, ConnectionLost
from acestep_consumer.broker.management import ManagementClient
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.client import Client, Unreachable
from acestep_consumer.config.settings import BrokerSettings, StorageSettings
from acestep_consumer.domain.errors import StorageRefused
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.domain.ports import Reply
from acestep_consumer.storage.s3.client import S3Client
from acestep_consumer.storage.s3.objects import S3Objects
from tests.support.broker import Peer, broker_settings, failed_event
from tests.support.command import run_command
from tests.support.tls import Authority, Front, TlsRabbitMQ
from tests.support.worker import WorkerProcess, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from infra.local.rabbitmq import RabbitMQ
    from infra.local.s3 import SeaweedFS

OTHER_NAME = "other.example"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that no server here has its certificate from."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def broker(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsRabbitMQ]:
    with TlsRabbitMQ(tmp_path_factory.mktemp("broker"), authority.certificate(), authority) as running:
        yield running


@pytest.fixture
async def s3_front(s3: SeaweedFS, authority: Authority) -> AsyncIterator[Front]:
    async with Front(s3.port, authority.certificate()) as front:
        yield front


def plainly(front: Front, url: str) -> str:
    """The same URL through ``front``."""
    return url.replace(f":{urlsplit(url).port}/", f":{front.port}/")


class TestBroker:
    async def test_with_its_authority_events_go_out_and_come_in(
        self, broker: TlsRabbitMQ, authority: Authority
    ) -> None:
        url = broker.tls_url(cafile=authority.bundle)
        async with (
            Front(broker.tls_port, None) as wire,
            BrokerConnection(broker_settings(plainly(wire, url)), "tls") as link,
        ):
            async with Peer(url) as peer:
                queue = await peer.subscribe("job.#")
                await Publisher(link, "w1").publish(failed_event("t1"), Reply())
                assert b"t1" in (await peer.take(queue)).body
            async with Client(plainly(wire, url)) as client:
                assert await client.submit({"task_id": "t1"}) == "t1"
            assert wire.spoke_only_tls

    @pytest.mark.parametrize("trust", ["the system's authorities", "another authority"])
    async def test_without_it_nobody_connects_and_the_text_says_what_to_change(
        self, broker: TlsRabbitMQ, stranger: Authority, trust: str
    ) -> None:
        url = broker.tls_url() if trust.startswith("the") else broker.tls_url(cafile=stranger.bundle)
        async with Front(broker.tls_port, None) as wire:
            with pytest.raises(BrokerRefused, match="trust the broker's certificate") as refusal:
                await BrokerConnection(broker_settings(plainly(wire, url)), "tls").__aenter__()
            assert "cafile=" in str(refusal.value)
            assert "guest:guest" not in str(refusal.value)
            with pytest.raises(Unreachable, match="certificate"):
                await Client(plainly(wire, url), patience_s=1).__aenter__()
            assert wire.spoke_only_tls

    async def test_a_certificate_for_another_name_is_not_enough(
        self, broker: TlsRabbitMQ, authority: Authority
    ) -> None:
        async with Front(broker.port, authority.certificate(OTHER_NAME)) as imposter:
            url = plainly(imposter, broker.tls_url(cafile=authority.bundle))
            with pytest.raises(BrokerRefused, match="Hostname mismatch"):
                await BrokerConnection(broker_settings(url), "tls").__aenter__()

    async def test_a_broker_that_does_not_speak_tls_is_told_nothing(
        self, broker: TlsRabbitMQ, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody on the way could answer without TLS, to be told the password."""
        async with Front(broker.port, None) as wire:
            url = plainly(wire, broker.tls_url(cafile=authority.bundle))
            link = BrokerConnection(broker_settings(url), "tls")
            with pytest.raises(BrokerError):
                await link._open()
            assert wire.spoke_only_tls


async def set_limit(settings: BrokerSettings) -> None:
    async with ManagementClient(settings) as management:
        await management.set_limit(5)


class TestManagementApi:
    async def test_it_is_reached_with_its_authority_alone(
        self, rabbitmq: RabbitMQ, authority: Authority, stranger: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        port = urlsplit(rabbitmq.management_url).port
        assert port
        async with Front(port, authority.certificate()) as front:
            url = SecretStr(f"https://guest:guest@localhost:{front.port}")
            settings = broker_settings("amqp://guest:guest@localhost/no-such-vhost", management_url=url)
            with pytest.raises(BrokerRefused, match="trust its certificate"):
                await set_limit(settings)
            monkeypatch.setenv("SSL_CERT_FILE", str(stranger.bundle))
            with pytest.raises(BrokerRefused, match="trust its certificate"):
                await set_limit(settings)
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
            with pytest.raises(BrokerRefused, match="knows no such virtual host"):
                await set_limit(settings)

    async def test_an_api_that_does_not_speak_tls_is_told_nothing(self, rabbitmq: RabbitMQ) -> None:
        port = urlsplit(rabbitmq.management_url).port
        assert port
        async with Front(port, None) as wire:
            url = SecretStr(f"https://guest:guest@localhost:{wire.port}")
            with pytest.raises(ConnectionLost):
                await set_limit(broker_settings("amqp://localhost", management_url=url))
            assert wire.spoke_only_tls


@asynccontextmanager
async def objects_at(s3: SeaweedFS, port: int, name: str = "localhost") -> AsyncIterator[tuple[S3Objects, S3Client]]:
    session = boto3.Session(
        aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key, region_name="us-east-1"
    )
    settings = StorageSettings(endpoint=f"https://{name}:{port}", bucket=s3.bucket)
    async with S3Objects(settings, session=session, retry_s=3) as objects:
        yield objects, objects.client


class TestStorage:
    async def test_with_its_authority_objects_are_written_and_read(
        self, s3: SeaweedFS, s3_front: Front, authority: Authority, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
        place = ObjectAddress(s3.bucket, f"{s3_prefix}/a")
        async with objects_at(s3, s3_front.port) as (objects, connection):
            # Both ways: boto3's own, and the signed requests of the event loop.
            await connection.call(
                place, lambda: connection.boto3.put_object(Bucket=s3.bucket, Key=place.key, Body=b"song")
            )
            head = await objects.head(place)
        assert head is not None
        assert head.size == 4

    @pytest.mark.parametrize("trust", ["the system's authorities", "another authority"])
    async def test_without_it_both_ways_are_refused_with_what_to_change(
        self, s3: SeaweedFS, authority: Authority, stranger: Authority, trust: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        if trust == "another authority":
            monkeypatch.setenv("AWS_CA_BUNDLE", str(stranger.bundle))
        place = ObjectAddress(s3.bucket, "a")
        async with (
            Front(s3.port, authority.certificate()) as front,
            Front(front.port, None) as wire,
            objects_at(s3, wire.port) as (objects, connection),
        ):
            for attempt in (
                objects.head(place),
                connection.call(place, lambda: connection.boto3.head_object(Bucket=s3.bucket, Key="a")),
            ):
                with pytest.raises(StorageRefused, match="the certificate is not trusted; set AWS_CA_BUNDLE"):
                    await attempt
            assert wire.spoke_only_tls

    async def test_a_certificate_for_another_name_is_not_enough(
        self, s3: SeaweedFS, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
        async with (
            Front(s3.port, authority.certificate(OTHER_NAME)) as imposter,
            objects_at(s3, imposter.port) as (objects, _),
        ):
            with pytest.raises(StorageRefused, match="certificate"):
                await objects.head(ObjectAddress(s3.bucket, "a"))


class TestWorker:
    @pytest.fixture
    def environment(
        self, broker: TlsRabbitMQ, authority: Authority, worker_environment: dict[str, str], tmp_path: Path
    ) -> dict[str, str]:
        """A worker whose broker and storage are behind TLS, and whose broker's URL is in a file."""
        (tmp_path / "amqp_url").write_text(broker.tls_url(cafile=authority.bundle) + "\n")
        kept = {name: value for name, value in worker_environment.items() if name != "ACESTEP_AMQP_URL"}
        return kept | {
            "ACESTEP_AMQP_URL_FILE": str(tmp_path / "amqp_url"),
            "AWS_CA_BUNDLE": str(authority.bundle),
        }

    async def test_a_worker_is_ready_with_all_of_it_behind_tls(
        self, environment: dict[str, str], s3_front: Front, tmp_path: Path
    ) -> None:
        environment["ACESTEP_S3_ENDPOINT"] = f"https://localhost:{s3_front.port}"
        async with running(WorkerProcess(tmp_path, environment)) as worker:
            status, _ = await asyncio.to_thread(worker.get, "/readyz")
            assert status == 200
        assert "amqps://localhost" in worker.log.read_text()
        assert "guest:guest" not in worker.log.read_text()

    def test_a_worker_that_trusts_another_authority_does_not_start_and_says_why(
        self, environment: dict[str, str], broker: TlsRabbitMQ, stranger: Authority, tmp_path: Path
    ) -> None:
        (tmp_path / "amqp_url").write_text(broker.tls_url(cafile=stranger.bundle))
        done = run_command("run", variables=environment | {"ACESTEP_HTTP_PORT": "0"})
        assert done.returncode == 2, done.stderr
        assert "trust the broker's certificate" in done.stderr
        assert "guest:guest" not in done.stderr
