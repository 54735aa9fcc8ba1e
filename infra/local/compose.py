# SPDX-License-Identifier: Apache-2.0
"""Runs RabbitMQ and MinIO with Docker Compose, from the project's docker-compose.yml, on free ports."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from infra.local.ports import LOOPBACK, PortClaim
from infra.local.process import ServerError

COMPOSE_FILE = Path(__file__).resolve().parents[2] / "docker-compose.yml"

_PROBE_TIMEOUT_S = 10
_UP_TIMEOUT_S = 600


def docker_answers() -> bool:
    """Whether a Docker engine answers and its client has Compose."""
    if shutil.which("docker") is None:
        return False
    probes = (["docker", "version", "--format", "{{.Server.Version}}"], ["docker", "compose", "version"])
    return all(_succeeds(probe) for probe in probes)


class ComposeServers:
    """A Compose project with its own name, ports and volumes."""

    bucket = "acestep"

    def __init__(self, project: str | None = None) -> None:
        """Choose the project's name; nothing is started yet.

        Args:
            project: the name of a running one, to stop it; None: a new one.
        """
        self.project = project or f"acestep-{secrets.token_hex(4)}"
        self.access_key, self.secret_key = "local", secrets.token_hex(16)
        self._claim = PortClaim(0 if project else 4)

    @property
    def amqp_url(self) -> str:
        """The default virtual host."""
        return f"amqp://{self.access_key}:{self.secret_key}@{LOOPBACK}:{self._claim.ports[0]}/%2F"

    @property
    def endpoint(self) -> str:
        """MinIO's S3 address."""
        return f"http://{LOOPBACK}:{self._claim.ports[2]}"

    def start(self) -> None:
        """Start both; returns once they are healthy and the bucket exists.

        Raises:
            ServerError: Compose failed; with its output.
        """
        try:
            self._compose("up", "--detach", "--wait", "rabbitmq", "minio")
            self._compose("run", "--rm", "--no-deps", "bucket")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the containers, the network and the volumes of this project."""
        self._compose("down", "--volumes", "--remove-orphans", "--timeout", "3")
        self._claim.release()

    def _compose(self, *arguments: str) -> None:
        command = ["docker", "compose", "--project-name", self.project, "--file", str(COMPOSE_FILE), *arguments]
        done = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=False, timeout=_UP_TIMEOUT_S
        )
        if done.returncode:
            raise ServerError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")

    def _environment(self) -> dict[str, str]:
        names = ("RABBITMQ_PORT", "RABBITMQ_MANAGEMENT_PORT", "MINIO_PORT", "MINIO_CONSOLE_PORT")
        ports = dict(zip(names, map(str, self._claim.ports), strict=False))
        keys = {"LOCAL_USER": self.access_key, "LOCAL_PASSWORD": self.secret_key}
        return os.environ | ports | keys


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=_PROBE_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
