# SPDX-License-Identifier: Apache-2.0
"""The worker's inputs with a web host on this machine and the session's S3: for tests of what is fetched and refused.

A test file names the fixtures that it uses in its ``__all__``.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import boto3
import pytest

from acestep_consumer.config.settings import InputSettings, StorageSettings
from acestep_consumer.inputs.fetch import AllowedInputs
from acestep_consumer.storage.s3.objects import S3Objects
from infra.local.s3 import REGION
from tests.support.https_server import HttpsServer, make_certificate

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp.abc import AbstractResolver

    from acestep_consumer.domain.job import Job
    from infra.local.s3 import SeaweedFS

THIS_MACHINE = "127.0.0.1/32"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine, and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def web_host(certificate: tuple[Path, Path]) -> AsyncIterator[HttpsServer]:
    """A running web host that serves what the test gives it."""
    async with HttpsServer(*certificate) as server:
        yield server


@pytest.fixture(scope="module")
def session(s3: SeaweedFS) -> boto3.Session:
    """One for all tests of a file: it takes a third of a second to read its description of S3."""
    return boto3.Session(aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key, region_name=REGION)


@asynccontextmanager
async def open_inputs(
    s3: SeaweedFS,
    session: boto3.Session,
    *,
    hosts: tuple[str, ...] = (),
    tls: ssl.SSLContext | None = None,
    resolver: AbstractResolver | None = None,
    checkpoint_dir: Path | None = None,
    **values: Any,
) -> AsyncIterator[AllowedInputs]:
    """Inputs that may read these hosts on this machine; ``values`` are settings of ``InputSettings``, and go first."""
    storage = StorageSettings(endpoint=s3.endpoint, bucket=s3.bucket)
    settings = InputSettings.model_validate({"hosts": hosts, "networks": THIS_MACHINE, **values})
    async with (
        S3Objects(storage, session=session, retry_s=5) as objects,
        AllowedInputs(objects, storage, settings, tls=tls, resolver=resolver, checkpoint_dir=checkpoint_dir) as inputs,
    ):
        yield inputs


def naming(job: Job, **places: str) -> Job:
    """Put places into a job that the request's rules would not let in: the inputs are the second line of defence."""
    return replace(job, request=job.request.model_copy(update=places))
