# SPDX-License-Identifier: Apache-2.0
"""The local servers start, keep their data over a restart, stand side by side, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aio_pika
import boto3
import pytest

from infra.local import packages
from infra.local import rabbitmq as rabbitmq_module
from infra.local.ports import PortClaim
from infra.local.process import Process, ProcessId, ServerError, wait_until
from infra.local.rabbitmq import RabbitMQ, speaks_amqp
from infra.local.s3 import REGION, Account, SeaweedFS
from infra.local.stack import Environment, Stack, given_broker, given_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.servers import ManagementApi

ROOT = Path(__file__).resolve().parents[2]


def client(server: SeaweedFS) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=REGION,
    )


def eventually(holds: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def sleeper(tmp_path: Path, *argv: str, guarded: bool = True) -> Process:
    return Process(argv, env=dict(os.environ), folder=tmp_path, log=tmp_path / "log", guarded=guarded)


def test_two_claims_never_hold_the_same_port() -> None:
    claims = [PortClaim(50) for _ in range(4)]
    ports = [port for claim in claims for port in claim.ports]
    for claim in claims:
        claim.release()
    assert len(set(ports)) == 200


def test_a_port_that_a_server_listens_on_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = PortClaim(2)
    taken, free = claim.ports
    claim.release()
    with socket.create_server(("127.0.0.1", taken)):
        picks = iter([taken, free])
        monkeypatch.setattr("infra.local.ports.random.choice", lambda _: next(picks))
        again = PortClaim(1)
        again.release()
    assert again.ports == (free,)


def test_a_process_that_ends_before_it_is_ready_is_reported_with_its_log(tmp_path: Path) -> None:
    process = sleeper(tmp_path, "/bin/sh", "-c", "echo cannot bind; exit 3")
    with pytest.raises(ServerError, match=r"toy ended with status 3 .*\n.*\ncannot bind"):
        wait_until(lambda: False, what="toy", processes=[process], timeout_s=10)
    process.end()


def test_a_server_that_is_never_ready_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    process = sleeper(tmp_path, "/bin/sh", "-c", "echo still loading; exec sleep 60")
    with pytest.raises(ServerError, match=r"(?s)toy was not ready after 0 s.*still loading"):
        wait_until(lambda: False, what="toy", processes=[process], timeout_s=0.3)
    process.end()
    assert not process.id.alive()


def test_a_process_that_ignores_sigterm_is_killed_with_its_group(tmp_path: Path) -> None:
    process = sleeper(tmp_path, "/bin/sh", "-c", "trap '' TERM; sleep 60 & wait; wait; sleep 60")
    process.end(grace_s=0.5)
    assert not process.running()
    assert eventually(lambda: not _group_exists(process.id.pid))


def _group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_missing_command_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="could not start no-such-program: No such file"):
        sleeper(tmp_path, "no-such-program")


def test_a_guarded_process_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from infra.local.process import Process\n"
        "here = Path(sys.argv[1])\n"
        "p = Process(['sleep', '300'], env=dict(os.environ), folder=here, log=here / 'log', guarded=True)\n"
        "print(p.id.pid, flush=True); time.sleep(300)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = ProcessId.of(int(owner.stdout.readline()))
    assert child.alive()
    owner.kill()
    owner.communicate()
    assert eventually(lambda: not child.alive())


async def test_a_broker_beside_another_keeps_what_it_stored_and_leaves_nothing_running(
    own_rabbitmq: RabbitMQ, rabbitmq: RabbitMQ
) -> None:
    await _publish(own_rabbitmq.amqp_url, b"kept")
    own_rabbitmq.restart()
    assert await _get(own_rabbitmq.amqp_url) == b"kept"
    assert own_rabbitmq.ctl("list_vhosts").split() == ["name", "/"]
    broker, port_mapper = (process.id for process in own_rabbitmq.processes)
    own_rabbitmq.kill()
    assert not broker.alive()
    assert not speaks_amqp("127.0.0.1", own_rabbitmq.port)
    own_rabbitmq.close()
    assert not port_mapper.alive()
    assert eventually(lambda: not _mentions(str(own_rabbitmq.folder)))
    assert speaks_amqp("127.0.0.1", rabbitmq.port)


async def _publish(url: str, body: bytes) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("q", durable=True)
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, "q", timeout=10)


async def _get(url: str) -> bytes:
    async with await aio_pika.connect(url) as connection:
        queue = await (await connection.channel()).declare_queue("q", durable=True)
        message = await queue.get(timeout=10)
        await message.ack()
        return message.body


def _mentions(text: str) -> list[str]:
    """Command lines of running processes that hold `text`."""
    lines = subprocess.run(
        ["/bin/ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in lines if text in line]


def test_a_failing_rabbitmqctl_says_what_went_wrong(rabbitmq: RabbitMQ) -> None:
    with pytest.raises(ServerError, match=r"(?s)rabbitmqctl delete_vhost missing failed.*does not exist"):
        rabbitmq.ctl("delete_vhost", "missing")


async def test_each_test_has_a_virtual_host_of_its_own(
    amqp_url: str, management: ManagementApi, amqp_vhost: str
) -> None:
    await _publish(amqp_url, b"mine")
    queues = management.call("GET", f"/api/queues/{amqp_vhost}")
    assert [queue["name"] for queue in queues] == ["q"]
    assert management.call("GET", "/api/queues/%2F") == []


def test_a_restarted_store_keeps_its_objects(own_s3: SeaweedFS) -> None:
    client(own_s3).put_object(Bucket=own_s3.bucket, Key="song.wav", Body=b"noise" * 1000)
    own_s3.restart()
    own_s3.kill()
    own_s3.start()
    assert client(own_s3).get_object(Bucket=own_s3.bucket, Key="song.wav")["Body"].read() == b"noise" * 1000


def test_a_fresh_store_is_empty(own_s3: SeaweedFS) -> None:
    assert client(own_s3).list_objects_v2(Bucket=own_s3.bucket)["KeyCount"] == 0


def test_a_store_lets_in_only_its_own_keys(s3: SeaweedFS) -> None:
    assert Account(s3.endpoint, s3.access_key, s3.secret_key).may_use(s3.bucket)
    assert not Account(s3.endpoint, s3.access_key, "wrong").may_use(s3.bucket)
    assert not Account(s3.endpoint, s3.access_key, s3.secret_key).may_use("another-bucket")


def test_a_closed_store_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    with SeaweedFS(tmp_path) as server:
        (process,) = server.processes
    assert not process.id.alive()
    assert not list(Path("/tmp").glob(f"seaweedfs-*{server.port}.sock"))  # noqa: S108  # where SeaweedFS puts them


def test_the_environment_survives_a_shell_and_hides_its_secrets() -> None:
    environment = Environment("amqp://u:p@h/%2F", "http://h:1", "bucket", "key", 'it\'s "$secret"')
    script = f'{environment.exports()}\nprintf %s "$AWS_SECRET_ACCESS_KEY"'
    shown = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown == environment.secret_key
    assert Environment.from_variables(environment.variables()) == environment
    assert "secret" not in repr(environment)
    assert "u:p" not in repr(environment)


def test_a_given_broker_and_store_are_used_as_they_are(
    service_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in service_environment.items():
        monkeypatch.setenv(name, value)
    with Stack(tmp_path) as environment:
        assert environment.variables().items() <= service_environment.items()
    assert not list(tmp_path.iterdir())


def test_a_given_broker_that_is_down_is_reported_without_its_password_and_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = (claim := PortClaim(1)).ports
    monkeypatch.setenv("ACESTEP_AMQP_URL", f"amqp://guest:hush@127.0.0.1:{port}/")
    assert given_broker() is None
    claim.release()
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}, but no broker answers there" in said
    assert "hush" not in said


def test_a_given_store_that_refuses_the_keys_is_reported_and_not_used(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Environment("amqp://h", s3.endpoint, s3.bucket, s3.access_key, "hush")
    for name, value in given.variables().items():
        monkeypatch.setenv(name, value)
    assert given_store("amqp://h") is None
    said = capsys.readouterr().err
    assert f"{s3.endpoint}, but its bucket is not accessible" in said
    assert "hush" not in said


def test_up_twice_is_one_stack_and_down_ends_exactly_that(amqp_url: str, tmp_path: Path) -> None:
    first = _state(tmp_path, amqp_url, "print(up(local).exports())")
    assert _state(tmp_path, amqp_url, "print(up(local).exports())") == first
    saved = json.loads((tmp_path / "stack.json").read_text())
    (process,) = (ProcessId(**process) for process in saved["processes"])
    assert process.alive()
    assert _state(tmp_path, amqp_url, "print(down(local), down(local))") == "True False\n"
    assert not process.alive()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert not any(Path(left).exists() for left in saved["leftovers"])


def test_up_starts_anew_when_its_servers_are_gone(amqp_url: str, tmp_path: Path) -> None:
    first = _state(tmp_path, amqp_url, "print(up(local).exports())")
    _state(tmp_path, amqp_url, "from infra.local.state import _read; _read(local).processes[0].end()")
    second = _state(tmp_path, amqp_url, "print(up(local).exports())")
    assert first != second
    assert len(list(tmp_path.glob("up-*"))) == 1
    assert _state(tmp_path, amqp_url, "print(down(local))") == "True\n"


def _state(local: Path, amqp_url: str, code: str) -> str:
    """What Python code prints that uses `up` and `down` with state in `local`, given a broker but no store."""
    code = f"from pathlib import Path; from infra.local.state import up, down; local = Path({str(local)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=_given_only(amqp_url), stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _given_only(amqp_url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACESTEP_", "AWS_"))}
    return kept | {"ACESTEP_AMQP_URL": amqp_url}


def test_exec_gives_the_command_its_servers_and_hands_back_its_status(amqp_url: str) -> None:
    command = [sys.executable, "-m", "infra.local", "exec", "--", "/bin/sh", "-c", 'echo "$ACESTEP_AMQP_URL"; exit 7']
    done = subprocess.run(command, cwd=ROOT, env=_given_only(amqp_url), stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    assert done.stdout.strip() == amqp_url


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exec_ends_its_servers_and_its_command_on_a_signal(amqp_url: str, number: signal.Signals) -> None:
    script = 'echo "$$ $ACESTEP_S3_ENDPOINT"; exec sleep 60'
    command = [sys.executable, "-m", "infra.local", "exec", "--", "/bin/sh", "-c", script]
    with subprocess.Popen(command, cwd=ROOT, env=_given_only(amqp_url), stdout=subprocess.PIPE, text=True) as stack:
        assert stack.stdout is not None
        pid, endpoint = stack.stdout.readline().split()
        child = ProcessId.of(int(pid))
        stack.send_signal(number)
        assert stack.wait(30) == 128 + number
    assert not child.alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])))


APT_GET = """#!/bin/sh
echo "$1 $([ -x "$POLICY" ] && echo policy)" >> "$CALLS"
[ "$1" = install ] || exit 0
[ -z "$FAIL" ] || { echo "E: no such package" >&2; exit 100; }
touch "$SCRIPTS/rabbitmq-server"
"""


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without RabbitMQ whose apt-get is a stand-in; the path of its policy for starting services."""
    apt_get = tmp_path / "bin" / "apt-get"
    apt_get.parent.mkdir()
    apt_get.write_text(APT_GET)
    apt_get.chmod(0o755)
    for name, value in {"POLICY": "policy", "CALLS": "calls", "SCRIPTS": "bin"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("PATH", f"{apt_get.parent}{os.pathsep}/bin")
    monkeypatch.setattr(packages, "_POLICY", tmp_path / "policy")
    monkeypatch.setattr(packages, "_as_root", list)
    monkeypatch.setattr(rabbitmq_module, "_PACKAGE_FOLDERS", (str(apt_get.parent),))
    return tmp_path / "policy"


def test_a_missing_rabbitmq_is_installed_once_and_its_service_is_not_started(
    bare_machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages.ensure_rabbitmq()
    packages.ensure_rabbitmq()
    calls = bare_machine.with_name("calls").read_text().splitlines()
    assert calls == ["update policy", "install policy"]
    assert not bare_machine.exists()
    assert "its system service is not started" in capsys.readouterr().err


def test_an_owners_policy_for_services_is_left_alone(bare_machine: Path) -> None:
    bare_machine.write_text("mine")
    packages.ensure_rabbitmq()
    assert bare_machine.read_text() == "mine"


def test_an_installation_that_fails_says_what_apt_said_and_leaves_no_policy(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "yes")
    with pytest.raises(ServerError, match=r"(?s)could not install rabbitmq-server.*E: no such package"):
        packages.ensure_rabbitmq()
    assert not bare_machine.exists()


def test_a_machine_that_can_neither_have_nor_install_rabbitmq_is_told_what_to_do(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(bare_machine.parent))
    with pytest.raises(ServerError, match="start Docker, or set ACESTEP_AMQP_URL"):
        packages.ensure_rabbitmq()
