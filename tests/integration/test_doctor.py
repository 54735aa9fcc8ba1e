# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer doctor`` against real servers: what it finds, and that it leaves nothing behind."""

import asyncio
import json
import os
import re
import socket
import subprocess
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aio_pika
import boto3
import pytest
from aio_pika.exceptions import DeliveryError

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import GENERATE, topology_with
from acestep_consumer.commands.doctor.broker import CHECKS as BROKER_CHECKS
from acestep_consumer.commands.doctor.broker import check_broker, check_management
from acestep_consumer.commands.doctor.machine import Machine, check_port
from acestep_consumer.commands.doctor.models import check_lm
from acestep_consumer.commands.doctor.report import Finding
from acestep_consumer.commands.doctor.storage import CHECKS, check_storage
from acestep_consumer.commands.topology import tier_names
from acestep_consumer.config.settings import Settings, WorkerSettings, load
from acestep_consumer.observability.http import HealthServer
from infra.local.rabbitmq import RabbitMQ
from infra.local.s3 import SeaweedFS
from infra.rabbitmq.users import User
from tests.support.broker import API_POLL_S, Peer, until
from tests.support.command import run_command
from tests.support.faulty_s3 import FaultyS3, s3_error
from tests.support.proxy import Proxy
from tests.support.servers import ManagementApi

# Under five on a machine with nothing else to do; tests may run beside others. A probe that hung would take for ever.
FAST_S = 15.0
LEVELS = {"ok", "warn", "fail", "skip"}
# So slow that all checks of the broker, and those of the store, take about ten seconds.
AMQP_BYTES_PER_S, S3_BYTES_PER_S = 1_500, 200


def run_doctor(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run_command("doctor", *arguments, variables={"ACESTEP_DEVICE": "cpu", "ACESTEP_HTTP_PORT": "0", **variables})


def report_of(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert not done.stderr or done.stderr.startswith("waiting for an answer: ")  # on a busy machine
    found: dict[str, Any] = json.loads(done.stdout)
    assert {finding["level"] for finding in found["findings"]} <= LEVELS
    assert found["took_s"] < FAST_S
    return found


def by_check(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in found["findings"]}


async def looked(findings: AsyncGenerator[Finding]) -> dict[str, Finding]:
    return {finding.check: finding async for finding in findings}


def settings_of(environment: dict[str, str], **more: str) -> Settings:
    ours = {name: value for name, value in environment.items() if name.startswith("ACESTEP_")}
    return load(ours | more, env_file=None)


async def declare(settings: Settings) -> None:
    async with BrokerConnection(settings.broker, "test") as link:
        for tier in tier_names(settings) or ():
            await link.declare_tier_queue(tier)


def queues(management: ManagementApi, vhost: str) -> set[str]:
    return {queue["name"] for queue in management.call("GET", f"/api/queues/{vhost}")}


@pytest.fixture
def settings(service_environment: dict[str, str]) -> Settings:
    return settings_of(service_environment)


@pytest.fixture
def aws(service_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The store's keys in this process's environment, as boto3 wants them."""
    for name, value in service_environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return service_environment


@pytest.fixture
def limited_user(management: ManagementApi, amqp_vhost: str, rabbitmq: RabbitMQ) -> Iterator[Any]:
    """Makes a user with these permissions; returns an AMQP URL with its login."""
    name = f"limited-{amqp_vhost}"

    def make(configure: str, write: str, read: str, tags: str = "") -> str:
        management.call("PUT", f"/api/users/{name}", {"password": "secret", "tags": tags})
        rights = {"configure": configure, "write": write, "read": read}
        management.call("PUT", f"/api/permissions/{amqp_vhost}/{name}", rights)
        return f"amqp://{name}:secret@127.0.0.1:{rabbitmq.port}/{amqp_vhost}"

    yield make
    management.call("DELETE", f"/api/users/{name}")


async def test_everything_in_place_is_all_ok_and_nothing_is_left_behind(
    service_environment: dict[str, str],
    tiny_checkpoints: Path,
    management: ManagementApi,
    rabbitmq: RabbitMQ,
    s3: SeaweedFS,
    s3_prefix: str,
    amqp_vhost: str,
    tmp_path: Path,
) -> None:
    environment = service_environment | {
        "ACESTEP_CHECKPOINT_DIR": str(tiny_checkpoints),
        "ACESTEP_CONFIG_PATH2": "acestep-v15-base",
        "ACESTEP_INIT_LLM": "true",
        "ACESTEP_MANAGEMENT_URL": rabbitmq.management_url,
        "ACESTEP_SCRATCH_DIR": str(tmp_path),
        "ACESTEP_EXECUTION_TIMEOUT_S": "600",
        "ACESTEP_ROUTE_BY_TIER": "true",
    }
    await declare(settings_of(environment))
    before = queues(management, amqp_vhost)
    done = run_doctor("--json", **environment)
    found = report_of(done)
    assert done.returncode == 0, done.stdout
    assert found["fit"] is True
    told = by_check(found)
    expected = {
        "settings", "broker", "acks", "permissions", "limit", "topology", "queue", "tier queues", "management",
        "bindings", "policies", "broker clock", *CHECKS, "packages", "device", "tier", "model acestep-v15-turbo",
        "model acestep-v15-base", "language model", "scratch", "port",
    }  # fmt: skip
    assert expected <= set(told)
    assert {check: told[check]["level"] for check in expected} == dict.fromkeys(expected, "ok")
    assert "RabbitMQ" in told["broker"]["said"]
    assert queues(management, amqp_vhost) == before
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - nothing else runs in this loop
    assert keys_under(s3, s3_prefix) == []


def keys_under(s3: SeaweedFS, prefix: str) -> list[str]:
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    try:
        found = client.list_objects_v2(Bucket=s3.bucket, Prefix=prefix)
    finally:
        client.close()
    return [each["Key"] for each in found.get("Contents", ())]


def test_an_empty_broker_is_fit_and_stays_empty(
    service_environment: dict[str, str], management: ManagementApi, amqp_vhost: str, tiny_checkpoints: Path
) -> None:
    done = run_doctor(**service_environment, ACESTEP_CHECKPOINT_DIR=str(tiny_checkpoints))
    assert done.returncode == 0, done.stdout
    assert "\x1b[" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("a worker can start here")
    assert any(line.startswith("warn  topology") and "queue acestep.generate" in line for line in lines)
    assert any("→" in line and "topology --declare" in line for line in lines)
    assert queues(management, amqp_vhost) == set()


def test_settings_that_cannot_be_read_are_a_line_each_and_the_rest_says_why_it_was_not_checked() -> None:
    done = run_doctor("--json", ACESTEP_QUEUE_MAXSIZE="many", ACESTEP_QUEUE_MAX="1")
    assert done.returncode == 6
    found = report_of(done)["findings"]
    assert [finding["level"] for finding in found] == ["fail", "fail", "skip"]
    assert "did you mean ACESTEP_QUEUE_MAXSIZE?" in found[0]["said"]
    assert "depends on the settings" in found[2]["said"]


async def test_the_card_is_told_with_its_tier_and_its_language_model(tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA L40S, 46068'\n")
    driver.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_CACHE": str(tmp_path)}
    settings = load({}, env_file=None)
    machine = Machine(settings, environ)
    told = await looked(machine.device())
    assert told["device"].said.startswith("NVIDIA L40S, 45.0 GB (from nvidia-smi)")
    assert told["tier"].said.startswith("unlimited of ")
    lm = await looked(check_lm(settings, machine, environ))
    assert "ACE-Step/acestep-5Hz-lm-4B is not on this disk yet" in lm["language model"].said


def test_servers_that_accept_and_never_answer_cost_their_own_lines_only() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = run_doctor(
            "--json",
            "--timeout",
            "8",
            ACESTEP_AMQP_URL=f"amqp://guest:guest@{address}/",
            ACESTEP_MANAGEMENT_URL=f"http://{address}",
            ACESTEP_S3_ENDPOINT=f"http://{address}",
            AWS_ACCESS_KEY_ID="x",
            AWS_SECRET_ACCESS_KEY="y",
        )
    assert done.returncode == 6
    told = by_check(report_of(done))
    for check in ("broker", "management", "storage"):
        assert told[check]["level"] == "fail"
        assert told[check]["said"].startswith("no answer within ")
        assert told[check]["fix"]
    assert told["scratch"]["level"] in {"ok", "warn"}
    assert told["port"]["level"] == "ok"


async def test_a_broker_that_is_not_there_leaves_its_other_checks_unchecked() -> None:
    found = await looked(check_broker(load({"ACESTEP_AMQP_URL": "amqp://127.0.0.1:1/"}, env_file=None)))
    assert found["broker"].level == "fail"
    assert "is unreachable" in found["broker"].said
    assert {found[check].level for check in set(found) - {"broker"}} == {"skip"}


@pytest.mark.parametrize(("login", "vhost", "said"), [("guest:wrong", "", "password"), ("guest:guest", "x", "exists")])
async def test_a_refused_login_is_told_with_what_to_check(
    rabbitmq: RabbitMQ, login: str, vhost: str, said: str
) -> None:
    url = f"amqp://{login}@127.0.0.1:{rabbitmq.port}/{vhost or '%2F'}"
    found = await looked(check_broker(load({"ACESTEP_AMQP_URL": url}, env_file=None)))
    assert found["broker"].level == "fail"
    assert said in found["broker"].said
    assert "wrong" not in found["broker"].said


async def test_permissions_that_a_worker_needs_are_missed_by_name(settings: Settings, limited_user: Any) -> None:
    await declare(settings)
    url = limited_user("^acestep[.]", "^acestep[.](requests|generate|control|dead-letter)", "^acestep[.](?!events$)")
    found = await looked(check_broker(load({"ACESTEP_AMQP_URL": url}, env_file=None)))
    assert found["permissions"].level == "fail"
    lacking = set(found["permissions"].said.removeprefix("this user lacks ").split(", "))
    assert lacking == {
        "write on acestep.events",
        "write on acestep.events.unrouted",
        "write on amq.default",
        "read on acestep.events",
    }


async def test_a_user_who_may_not_configure_is_told_so(settings: Settings, limited_user: Any) -> None:
    await declare(settings)
    found = await looked(check_broker(load({"ACESTEP_AMQP_URL": limited_user("^$", ".*", ".*")}, env_file=None)))
    assert found["permissions"].level == "fail"
    assert "configure on acestep.generate" in found["permissions"].said
    assert found["topology"].level == "fail"
    assert "a worker declares its queues" in (found["topology"].fix or "")


async def test_the_smallest_permissions_that_the_fix_names_are_enough(settings: Settings, limited_user: Any) -> None:
    await declare(settings)
    url = limited_user("^acestep[.].*", "^(acestep[.].*|amq[.]default)$", "^acestep[.].*")
    found = await looked(check_broker(load({"ACESTEP_AMQP_URL": url}, env_file=None)))
    assert {check for check, finding in found.items() if finding.level not in {"ok", "warn"}} == set()
    assert found["permissions"].level == "ok"


async def test_the_login_that_is_made_for_a_worker_is_enough(
    settings: Settings, limited_user: Any, management: ManagementApi, amqp_vhost: str
) -> None:
    await declare(settings)
    role = User.parse("worker")
    rights = role.permission(amqp_vhost)
    url = limited_user(rights["configure"], rights["write"], rights["read"])
    for bound in role.topic_permissions(amqp_vhost):
        management.call("PUT", f"/api/topic-permissions/{amqp_vhost}/{urlsplit(url).username}", bound)
    found = await looked(check_broker(load({"ACESTEP_AMQP_URL": url}, env_file=None)))
    assert {check for check, finding in found.items() if finding.level not in {"ok", "warn"}} == set()
    assert found["permissions"].level == "ok"


async def test_a_queue_of_the_other_type_is_an_error(settings: Settings, service_environment: dict[str, str]) -> None:
    await declare(settings)
    found = await looked(check_broker(settings_of(service_environment, ACESTEP_QUEUE_TYPE="quorum")))
    assert found["topology"].level == "fail"
    assert "x-queue-type" in found["topology"].said
    assert found["limit"].level == "skip"


async def test_queues_of_tiers_that_were_declared_otherwise_are_told(
    service_environment: dict[str, str], amqp_url: str
) -> None:
    settings = settings_of(service_environment, ACESTEP_ROUTE_BY_TIER="true")
    arguments = topology_with(settings.broker, 200).tier_queue("tier3").with_limit(20).arguments
    async with Peer(amqp_url) as peer:
        await peer.channel.declare_queue("acestep.generate.tier3", durable=True, arguments=dict(arguments))
        await declare(settings)
        found = (await looked(check_broker(settings)))["tier queues"]
        assert (found.level, found.said) == (
            "warn",
            "acestep.generate.tier3 was declared for 20 messages, and ACESTEP_QUEUE_MAXSIZE is 200",
        )
        await peer.channel.queue_delete("acestep.generate.tier3")
        await peer.channel.declare_queue("acestep.generate.tier3", durable=True)
    found = (await looked(check_broker(settings)))["tier queues"]
    assert found.level == "fail"
    assert "no worker starts: " in found.said
    assert "acestep.generate.tier3" in found.said
    assert "--if-empty" in (found.fix or "")


async def test_a_limit_other_than_the_setting_is_told_with_the_commands(
    settings: Settings, service_environment: dict[str, str], management: ManagementApi, amqp_vhost: str
) -> None:
    await declare(settings)
    found = await looked(check_broker(settings_of(service_environment, ACESTEP_QUEUE_MAXSIZE="100")))
    assert found["limit"].level == "fail"
    assert "declared for 200 messages" in found["limit"].said
    assert "rabbitmqctl set_policy" in (found["limit"].fix or "")
    assert found["topology"].level == "ok"
    policy = {"pattern": "^acestep[.]", "definition": {"max-length": 7}, "apply-to": "queues", "priority": 1}
    management.call("PUT", f"/api/policies/{amqp_vhost}/forgotten", policy)
    found = await looked(check_broker(settings))
    assert found["limit"].level == "fail"
    assert "hold only 7 messages" in found["limit"].said


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_a_policy_that_keeps_workers_from_starting_is_told_and_what_it_drops_where_that_counts(
    service_environment: dict[str, str],
    rabbitmq: RabbitMQ,
    management: ManagementApi,
    amqp_url: str,
    amqp_vhost: str,
    queue_type: str,
) -> None:
    policy = {"pattern": "^acestep[.]", "definition": {"overflow": "drop-head"}, "apply-to": "queues"}
    await asyncio.to_thread(management.call, "PUT", f"/api/policies/{amqp_vhost}/theirs", policy)
    few = service_environment | {"ACESTEP_QUEUE_TYPE": queue_type, "ACESTEP_QUEUE_MAXSIZE": "2"}
    await declare(settings_of(few))
    refused = 0
    async with Peer(amqp_url) as producer:
        for number in range(4):
            try:
                await producer.request(str(number).encode())
            except DeliveryError:
                refused += 1
    assert refused == (0 if queue_type == "quorum" else 2)
    watched = settings_of(few, ACESTEP_MANAGEMENT_URL=rabbitmq.management_url).broker

    async def known() -> bool:
        """Whether the API tells the queue's policy yet: its figures are some seconds old."""
        queue = await asyncio.to_thread(management.call, "GET", f"/api/queues/{amqp_vhost}/{GENERATE}")
        return bool(queue.get("effective_policy_definition"))

    await until(known, "the queue's policy", every_s=API_POLL_S)
    found = await looked(check_management(watched))
    assert found["policies"].level == "fail"
    assert "no worker starts: the policy 'theirs' covers acestep.generate too" in found["policies"].said
    assert "narrow its pattern '^acestep[.]'" in (found["policies"].fix or "")
    drops = "acestep.generate: overflow = drop-head: a full queue drops its oldest"
    assert (drops in found["policies"].said) == (queue_type == "quorum")


async def test_requests_that_nobody_takes_are_a_warning(settings: Settings, amqp_url: str) -> None:
    await declare(settings)
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(b"{}"), GENERATE)
    found = await looked(check_broker(settings))
    assert found["queue"].level == "warn"
    assert "1 of 200 waiting; consumers: 0" in found["queue"].said


async def test_the_management_api_is_judged_by_what_its_user_may(
    settings: Settings, service_environment: dict[str, str], rabbitmq: RabbitMQ, limited_user: Any
) -> None:
    await declare(settings)
    url = urlsplit(limited_user(".*", ".*", ".*", tags="monitoring"))
    api = rabbitmq.management_url
    login = f"{quote(url.username or '')}:{url.password}"
    viewer = settings_of(service_environment, ACESTEP_MANAGEMENT_URL=api.replace("//", f"//{login}@"))
    found = await looked(check_management(viewer.broker))
    assert found["management"].level == "fail"
    assert "user tags: monitoring" in found["management"].said
    assert (found["bindings"].level, found["policies"].level) == ("ok", "ok")
    stranger = settings_of(service_environment, ACESTEP_MANAGEMENT_URL=api.replace("//", "//guest:wrong@"))
    assert "refuses the login" in (await looked(check_management(stranger.broker)))["management"].said
    nobody = settings_of(service_environment, ACESTEP_MANAGEMENT_URL="http://127.0.0.1:1")
    assert "no answer" in (await looked(check_management(nobody.broker)))["management"].said


async def test_a_binding_that_somebody_removed_is_missed(
    settings: Settings, service_environment: dict[str, str], rabbitmq: RabbitMQ, amqp_url: str
) -> None:
    await declare(settings)
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        queue = await channel.get_queue(GENERATE, ensure=False)
        await queue.unbind("acestep.requests", "generate.#")
    watched = settings_of(service_environment, ACESTEP_MANAGEMENT_URL=rabbitmq.management_url)
    found = await looked(check_management(watched.broker))
    assert found["bindings"].level == "warn"
    assert "acestep.requests → acestep.generate" in found["bindings"].said


async def test_storage_that_refuses_the_keys_is_told_and_its_clock_is_read_all_the_same(
    aws: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    found = await looked(check_storage(settings_of(aws).storage))
    assert found["storage"].level == "ok"
    assert found["storage clock"].level == "ok"
    assert found["bucket"].level == "fail"
    assert "AWS_SECRET_ACCESS_KEY" in found["bucket"].said
    assert {found[check].level for check in CHECKS[3:]} == {"skip"}


@pytest.mark.parametrize(("create", "level"), [("false", "fail"), ("true", "warn")])
async def test_a_bucket_that_is_not_there_is_an_error_unless_a_worker_may_create_it(
    aws: dict[str, str], create: str, level: str
) -> None:
    settings = settings_of(aws, ACESTEP_S3_BUCKET="not-there-yet", ACESTEP_S3_CREATE_BUCKET=create)
    found = await looked(check_storage(settings.storage))
    assert found["bucket"].level == level
    assert {found[check].level for check in CHECKS[3:]} == {"skip"}


@pytest.mark.usefixtures("aws")
async def test_storage_where_nobody_listens_fails_within_its_patience() -> None:
    found = await looked(check_storage(settings_of({"ACESTEP_S3_ENDPOINT": "http://127.0.0.1:1"}).storage))
    assert found["storage"].level == "fail"
    assert "http://127.0.0.1:1" in found["storage"].said
    assert "ACESTEP_S3_ENDPOINT" in (found["storage"].fix or "")
    assert tuple(found) == CHECKS


async def test_a_port_that_a_worker_has_is_a_warning() -> None:
    async with HealthServer({}, lambda _: (b"", "text/plain"), "127.0.0.1", 0) as worker:
        found = await check_port(WorkerSettings(http_port=worker.port))
    assert found.level == "warn"
    assert "in use by another worker" in found.said


async def test_a_broker_and_a_store_that_answer_slowly_are_a_warning(
    settings: Settings, service_environment: dict[str, str]
) -> None:
    """As on a machine that is busy: each answer comes, and all of them together take longer than anybody waits."""
    await declare(settings)
    url, endpoint = service_environment["ACESTEP_AMQP_URL"], service_environment["ACESTEP_S3_ENDPOINT"]
    async with Proxy.for_url(url) as amqp, Proxy.for_url(endpoint) as s3:
        amqp.slow(AMQP_BYTES_PER_S)
        s3.slow(S3_BYTES_PER_S)
        through = {"ACESTEP_AMQP_URL": amqp.url(url), "ACESTEP_S3_ENDPOINT": f"http://127.0.0.1:{s3.port}"}
        environment = {**service_environment, **through, "ACESTEP_CONFIG_PATH": "acestep-v15-turbo"}
        done = await asyncio.to_thread(run_doctor, "--json", "--timeout", "100", **environment)
    found = by_check(json.loads(done.stdout))
    remote = (*BROKER_CHECKS, *CHECKS)
    assert {check: found[check]["said"] for check in remote if found[check]["level"] == "fail"} == {}
    assert found["speed"]["level"] == "warn"
    assert all(re.search(rf"\b{check} \((\d+) s\)", found["speed"]["said"]) for check in ("broker", "storage"))


async def test_a_broker_that_stays_silent_fails_after_the_timeout(service_environment: dict[str, str]) -> None:
    url = service_environment["ACESTEP_AMQP_URL"]
    async with Proxy.for_url(url) as amqp:
        amqp.stall()
        environment = {**service_environment, "ACESTEP_AMQP_URL": amqp.url(url)}
        done = await asyncio.to_thread(run_doctor, "--json", "--timeout", "15", **environment)
    found = by_check(json.loads(done.stdout))
    assert done.returncode == 6
    assert found["broker"]["level"] == "fail"
    assert found["storage"]["level"] == "ok"


@pytest.mark.usefixtures("aws")
async def test_a_store_that_puts_requests_off_is_busy_and_not_broken(service_environment: dict[str, str]) -> None:
    async with FaultyS3(service_environment["ACESTEP_S3_ENDPOINT"]) as s3:
        settings = settings_of({**service_environment, "ACESTEP_S3_ENDPOINT": s3.endpoint})
        with s3.fault(lambda _: s3_error(503, "SlowDown")):
            found = await looked(check_storage(settings.storage))
    assert found["storage"].level == "warn"
    assert "answers, but is busy" in found["storage"].said
    assert {found[check].level for check in CHECKS[1:]} == {"skip"}
