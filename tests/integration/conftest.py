# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that run a whole worker: a checkpoint, a virtual host and a worker for all of them."""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiormq.channel import Channel

from infra.local.rabbitmq import RabbitMQ
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.support import fork_server
from tests.support.servers import ManagementApi
from tests.support.worker import WorkerProcess

LATE_S = 0.5


@pytest.fixture(scope="module", autouse=True)
def forked_processes() -> Iterator[None]:
    """Start workers, engines and commands as forks, which spares seconds of imports; not with ``fresh_processes``."""
    with fork_server.forking():
        yield


@pytest.fixture
def fresh_processes() -> Iterator[None]:
    """Start this test's processes as an operator does, each with an interpreter of its own."""
    with fork_server.not_forking():
        yield


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny turbo and base models and the tiny language model."""
    from acestep_consumer.engine.testing import tiny_checkpoint, tiny_lm  # noqa: PLC0415 - needs torch

    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_checkpoint.write(folder)
    tiny_lm.write(folder)
    return folder


@contextmanager
def environment_of_a_worker(
    rabbitmq: RabbitMQ, management: ManagementApi, s3: SeaweedFS, checkpoints: Path
) -> Iterator[dict[str, str]]:
    """Settings of a worker with both tiny models, on a virtual host and a prefix of its own."""
    vhost = f"worker-{uuid.uuid4().hex}"
    management.add_vhost(vhost)
    servers = Environment.of(rabbitmq.vhost_url(vhost), s3)
    yield servers.variables() | {
        "ACESTEP_S3_PREFIX": vhost,
        "ACESTEP_CHECKPOINT_DIR": str(checkpoints),
        "ACESTEP_CONFIG_PATH": "acestep-v15-turbo",
        "ACESTEP_CONFIG_PATH2": "acestep-v15-base",
        "ACESTEP_QUEUE_WORKERS": "2",
        "ACESTEP_API_WORKERS": "2",
        "ACESTEP_INIT_LLM": "false",
    }
    management.delete_vhost(vhost)


@pytest.fixture(scope="session")
def worker_environment(
    rabbitmq: RabbitMQ, management: ManagementApi, s3: SeaweedFS, tiny_checkpoints: Path
) -> Iterator[dict[str, str]]:
    """Settings of the worker that most tests share."""
    with environment_of_a_worker(rabbitmq, management, s3, tiny_checkpoints) as environment:
        yield environment


@pytest.fixture(scope="module")
def own_worker_environment(
    rabbitmq: RabbitMQ, management: ManagementApi, s3: SeaweedFS, tiny_checkpoints: Path
) -> Iterator[dict[str, str]]:
    """Settings of a worker that only one file's tests use."""
    with environment_of_a_worker(rabbitmq, management, s3, tiny_checkpoints) as environment:
        yield environment


@pytest.fixture(scope="session")
def worker(worker_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A running worker."""
    with WorkerProcess(tmp_path_factory.mktemp("worker"), worker_environment) as running:
        yield running


@pytest.fixture
def close_received(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when the broker closes a channel. The client's confirmation leaves a moment later, as on a busy machine."""
    received, confirm = asyncio.Event(), Channel._on_close_frame

    async def confirm_late(channel: Channel, frame: Any) -> None:
        received.set()
        await asyncio.sleep(LATE_S)
        await confirm(channel, frame)

    monkeypatch.setattr(Channel, "_on_close_frame", confirm_late)
    return received
