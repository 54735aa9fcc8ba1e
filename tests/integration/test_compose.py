# SPDX-License-Identifier: Apache-2.0
"""docker-compose.yml, and what is started through it: without an engine, a stand-in records how docker is called."""

from __future__ import annotations

import configparser
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from acestep_consumer.cli import run
from acestep_consumer.config.settings import known_variables, load
from infra.local.compose import ComposeServers, docker_answers
from infra.local.process import ServerError

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = inspect.signature(run).parameters["grace"].default
FILE = ROOT / "docker-compose.yml"
TEXT = FILE.read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

# Writes down how it was called; `docker compose ... run` fails when FAIL is set.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=calls)
if os.environ.get("FAIL") and os.environ["FAIL"] in sys.argv:
    sys.exit("no such image")
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the docker command on PATH; the file that lists its calls."""
    command = tmp_path / "bin" / "docker"
    command.parent.mkdir()
    command.write_text(STAND_IN)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def calls(record: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [(call[0], call[1]) for call in map(json.loads, record.read_text().splitlines())]


def test_the_file_follows_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_file_that_breaks_the_specification_is_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(TEXT.replace("stop_grace_period", "stop_grace"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stop_grace" in done.stdout


def test_every_acestep_variable_is_a_setting_of_the_worker() -> None:
    used = set(re.findall(r"ACESTEP_[A-Z0-9_]+", TEXT))
    assert {"ACESTEP_AMQP_URL_FILE", "ACESTEP_S3_ENDPOINT", "ACESTEP_CHECKPOINT_DIR"} <= used
    assert used <= known_variables()


def test_every_acestep_variable_of_the_image_is_a_setting_of_the_worker() -> None:
    used = set(re.findall(r"ACESTEP_[A-Z0-9_]+", (ROOT / "infra/Dockerfile").read_text()))
    assert used <= known_variables()


@pytest.mark.parametrize("name", SERVICES)
def test_every_port_is_bound_to_this_machine(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_every_foreign_image_is_pinned(name: str) -> None:
    service = SERVICES[name]
    repository, _, tag = service["image"].rpartition(":")
    assert repository
    assert tag != "latest"
    assert "build" in service or re.search(r"\d", tag)


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_waits_for_exists_and_can_come_true(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert "restart" not in SERVICES[other], "a service that restarts never completes"


@pytest.mark.parametrize("name", SERVICES)
def test_every_volume_is_declared_and_every_mounted_file_is_in_the_repository(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        if mount.startswith("./"):
            assert (ROOT / mount.split(":")[0]).exists()
        elif not mount.startswith("${"):
            assert mount.split(":")[0] in COMPOSE["volumes"]


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" in service])
def test_what_runs_our_image_has_a_read_only_root_no_capabilities_and_gains_no_privilege(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108 - the container's own
    assert not {"privileged", "cap_add", "user", "pid", "ipc", "network_mode", "devices"} & set(service)
    written = [mount for mount in service.get("volumes", []) if not mount.endswith(":ro")]
    allowed = {"checkpoint": ["checkpoints:/checkpoints"], "worker-gpu": ["cache:/var/cache/acestep"]}
    assert written == allowed.get(name, [])


@pytest.mark.parametrize("name", ["worker", "worker-gpu", "gateway"])
def test_a_workers_secrets_are_files_and_its_environment_holds_none(name: str) -> None:
    environment = SERVICES[name]["environment"]
    files = {path for path in environment.values() if str(path).startswith("/run/secrets/")}
    assert files == {f"/run/secrets/{secret}" for secret in SERVICES[name]["secrets"]}
    assert set(SERVICES[name]["secrets"]) <= set(COMPOSE["secrets"])
    assert not [value for value in environment.values() if "PASSWORD" in str(value) or "@" in str(value)]
    assert not {"AWS_SECRET_ACCESS_KEY", "ACESTEP_AMQP_URL", "ACESTEP_MANAGEMENT_URL"} & set(environment)


def test_the_secret_files_of_development_open_the_servers_of_development() -> None:
    default = re.compile(r"\$\{\w+:-(.*?)\}")
    files = {name: ROOT / default.sub(r"\1", secret["file"]) for name, secret in COMPOSE["secrets"].items()}
    environment = {
        variable: str(files[Path(value).name]) if str(value).startswith("/run/secrets/") else default.sub(r"\1", value)
        for variable, value in SERVICES["worker"]["environment"].items()
    }
    user, password = "acestep", "acestep-local"
    broker = load(environment, None).broker
    assert broker.url.get_secret_value() == f"amqp://{user}:{password}@rabbitmq:5672/%2F"
    assert broker.management_url is not None
    assert broker.management_url.get_secret_value() == f"http://{user}:{password}@rabbitmq:15672"
    keys = configparser.ConfigParser()
    keys.read(environment["AWS_SHARED_CREDENTIALS_FILE"])
    assert dict(keys["default"]) == {"aws_access_key_id": user, "aws_secret_access_key": password}
    for service in ("rabbitmq", "minio"):
        given = list(SERVICES[service]["environment"].values())
        assert given == [f"${{LOCAL_USER:-{user}}}", f"${{LOCAL_PASSWORD:-{password}}}"]


def test_workers_and_the_watchers_start_only_when_asked_for() -> None:
    """The demo's worker beside a real one on the same queue would make noise of every second request."""
    asked = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert asked == {
        "checkpoint": ["demo"],
        "worker": ["demo"],
        "worker-gpu": ["gpu"],
        "gateway": ["rest"],
        "prometheus": ["observe"],
        "grafana": ["observe"],
    }


def test_no_profile_starts_a_worker_with_random_weights_beside_a_real_one() -> None:
    """Both would consume one queue, and half of the customers' songs would be noise."""
    starts = [name for name, service in SERVICES.items() if "gpu" in service.get("profiles", ["gpu"])]
    assert starts == ["rabbitmq", "minio", "bucket", "worker-gpu"]


def test_the_gpu_image_has_vllm_and_the_compiler_that_triton_needs() -> None:
    assert SERVICES["worker-gpu"]["build"]["args"] == {"EXTRAS": "engine,vllm"}
    dockerfile = (ROOT / "infra/Dockerfile").read_text()
    assert 'ARG COMPILER="gcc libc6-dev"' in dockerfile
    assert SERVICES["worker-gpu"]["shm_size"] == "4gb"


def test_kernels_and_hub_downloads_of_the_gpu_worker_outlive_its_container() -> None:
    worker = SERVICES["worker-gpu"]
    places = [Path(worker["environment"][name]) for name in ("ACESTEP_COMPILE_CACHE", "VLLM_CACHE_ROOT", "HF_HOME")]
    mounts = [Path(mount.split(":")[1]) for mount in worker["volumes"] if mount.split(":")[0] in COMPOSE["volumes"]]
    assert all(any(place.is_relative_to(mount) for mount in mounts) for place in places)


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_a_worker_is_killed_later_than_its_own_grace_ends(name: str) -> None:
    minutes = int(SERVICES[name]["stop_grace_period"].removesuffix("m"))
    assert 60 * minutes >= GRACE_S + 60


def test_the_image_runs_as_an_ordinary_user_and_copies_only_what_is_not_ignored() -> None:
    lines = (ROOT / "infra/Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["10001:10001"]
    copied = [name for line in lines if re.match(r"COPY (?!--from)", line) for name in line.split()[1:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_servers_are_a_project_of_their_own_on_free_ports(docker: Path) -> None:
    assert docker_answers()
    servers = ComposeServers()
    servers.start()
    servers.close()
    (_, _, (up, variables), (bucket, _), (down, _)) = calls(docker)
    project = ["compose", "--project-name", servers.project, "--file", str(FILE)]
    assert up == [*project, "up", "--detach", "--wait", "rabbitmq", "minio"]
    assert bucket == [*project, "run", "--rm", "--no-deps", "bucket"]
    assert down[: len(project) + 2] == [*project, "down", "--volumes"]
    assert servers.amqp_url == (
        f"amqp://{variables['LOCAL_USER']}:{variables['LOCAL_PASSWORD']}@127.0.0.1:{variables['RABBITMQ_PORT']}/%2F"
    )
    assert servers.endpoint == f"http://127.0.0.1:{variables['MINIO_PORT']}"


def test_the_ports_and_keys_that_the_servers_choose_are_the_ones_that_the_file_reads(docker: Path) -> None:
    before = set(os.environ)
    servers = ComposeServers()
    servers.start()
    servers.close()
    chosen = set(calls(docker)[0][1]) - before
    read = set(re.findall(r"\$\{(\w+)", TEXT))
    assert {"RABBITMQ_PORT", "MINIO_PORT", "LOCAL_USER"} <= chosen & read
    assert all(name in read for name in chosen if not name.startswith(("LC_", "__")))


def test_a_start_that_fails_is_cleaned_up_and_told(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "run")
    with pytest.raises(ServerError, match=r"(?s)run --rm --no-deps bucket failed.*no such image"):
        ComposeServers().start()
    assert "down" in calls(docker)[-1][0]


def test_an_engine_that_does_not_answer_is_not_used(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "version")
    assert not docker_answers()
