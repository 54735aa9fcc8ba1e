# SPDX-License-Identifier: Apache-2.0
"""Chooses and starts the servers: the caller's own, Docker Compose, or native processes."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from infra.local.compose import ComposeServers, docker_answers
from infra.local.packages import ensure_rabbitmq
from infra.local.rabbitmq import RabbitMQ, speaks_amqp
from infra.local.s3 import REGION, Account, SeaweedFS

if TYPE_CHECKING:
    from pathlib import Path

    from infra.local.process import ProcessId


@dataclass(frozen=True)
class Environment:
    """The servers' addresses and keys, under the names of the product's settings."""

    amqp_url: str = field(repr=False)
    s3_endpoint: str
    s3_bucket: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    region: str = REGION

    def variables(self) -> dict[str, str]:
        """Return the environment variables for a worker, a client or a test."""
        return {
            "ACESTEP_AMQP_URL": self.amqp_url,
            "ACESTEP_S3_ENDPOINT": self.s3_endpoint,
            "ACESTEP_S3_BUCKET": self.s3_bucket,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    @classmethod
    def from_variables(cls, variables: dict[str, str]) -> Environment:
        """Return the inverse of `variables()`; a missing one raises KeyError."""
        return cls(
            amqp_url=variables["ACESTEP_AMQP_URL"],
            s3_endpoint=variables["ACESTEP_S3_ENDPOINT"],
            s3_bucket=variables["ACESTEP_S3_BUCKET"],
            access_key=variables["AWS_ACCESS_KEY_ID"],
            secret_key=variables["AWS_SECRET_ACCESS_KEY"],
            region=variables.get("AWS_DEFAULT_REGION", REGION),
        )

    @classmethod
    def of(cls, amqp_url: str, store: SeaweedFS) -> Environment:
        """Return the environment of a broker and a private SeaweedFS."""
        return cls(amqp_url, store.endpoint, store.bucket, store.access_key, store.secret_key)

    def exports(self) -> str:
        """Return the variables as lines for a POSIX shell to `eval`."""
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in self.variables().items())


def say(text: str) -> None:
    """Print a message to standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


class Stack:
    """A broker and an S3 server; a context manager that yields their `Environment`.

    In this order: the broker of ACESTEP_AMQP_URL if it answers (with the storage of ACESTEP_S3_ENDPOINT if the keys are
    accepted); Docker Compose if an engine answers; else rabbitmq-server and SeaweedFS as our own processes.
    """

    def __init__(self, folder: Path, *, guarded: bool = True) -> None:
        """Remember where to start; nothing is chosen yet.

        Args:
            folder: for the servers' data and logs.
            guarded: stop native servers when this process dies; False: they keep running.
        """
        self._folder = folder
        self._guarded = guarded
        self._running = ExitStack()
        self.processes: list[ProcessId] = []
        self.leftovers: list[Path] = []
        self.compose_project: str | None = None

    def __enter__(self) -> Environment:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Environment:
        """Start the servers that are not running.

        Raises:
            ServerError: a server could not be started.
        """
        try:
            return self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what `start()` started, and nothing that was given."""
        self._running.close()

    def _start(self) -> Environment:
        amqp_url = given_broker()
        if amqp_url is not None:
            return given_store(amqp_url) or self._with_seaweedfs(amqp_url)
        if docker_answers():
            return self._with_compose()
        return self._with_seaweedfs(self._start_rabbitmq())

    def _with_compose(self) -> Environment:
        say("Starting RabbitMQ and MinIO with Docker Compose ...")
        servers = ComposeServers()
        self.compose_project = servers.project
        servers.start()
        self._running.callback(servers.close)
        return Environment(servers.amqp_url, servers.endpoint, servers.bucket, servers.access_key, servers.secret_key)

    def _start_rabbitmq(self) -> str:
        ensure_rabbitmq()
        say("Starting RabbitMQ (about five seconds) ...")
        broker = RabbitMQ(self._folder / "rabbitmq", guarded=self._guarded)
        self._running.callback(broker.close)
        broker.start()
        self.processes += [process.id for process in broker.processes]
        return broker.amqp_url

    def _with_seaweedfs(self, amqp_url: str) -> Environment:
        say("Starting an S3 server, SeaweedFS (about a second) ...")
        store = SeaweedFS(self._folder / "s3", guarded=self._guarded)
        self._running.callback(store.close)
        store.start()
        self.processes += [process.id for process in store.processes]
        self.leftovers += store.sockets()
        return Environment.of(amqp_url, store)


def given_broker() -> str | None:
    """Return ACESTEP_AMQP_URL if a broker answers there, else None; prints which."""
    url = os.environ.get("ACESTEP_AMQP_URL")
    if not url:
        return None
    parts = urlsplit(url)
    where = f"{parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
    host, _, port = where.rpartition(":")
    if not speaks_amqp(host, int(port), tls=parts.scheme == "amqps"):
        say(f"ACESTEP_AMQP_URL names {where}, but no broker answers there: starting another.")
        return None
    say(f"Using the broker of ACESTEP_AMQP_URL, {where}. Messages already waiting there will be processed too.")
    return url


def given_store(amqp_url: str) -> Environment | None:
    """Return the storage of ACESTEP_S3_ENDPOINT if it is set with bucket and keys, and accepts these; else None."""
    try:
        given = Environment.from_variables(dict(os.environ) | {"ACESTEP_AMQP_URL": amqp_url})
    except KeyError:
        return None
    if not Account(given.s3_endpoint, given.access_key, given.secret_key).may_use(given.s3_bucket):
        say(f"ACESTEP_S3_ENDPOINT names {given.s3_endpoint}, but its bucket is not accessible: starting another.")
        return None
    say(f"Using the storage of ACESTEP_S3_ENDPOINT, {given.s3_endpoint}, bucket {given.s3_bucket}.")
    return given
