# SPDX-License-Identifier: Apache-2.0
"""The client is light: it loads what producers need, and nothing of the worker."""

import subprocess
import sys

import pytest

from tests.support.distributions import distribution_of, with_requirements

OURS = {"acestep_consumer", "acestep_schemas"}
LISTING = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"


def modules_after(code: str) -> set[str]:
    """The top-level modules of a new process that has run ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {LISTING}"], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["acestep_consumer.client", "acestep_consumer.client.sync"])
def test_importing_the_client_needs_aio_pika_and_pydantic_alone(module: str) -> None:
    allowed = with_requirements("aio-pika", "pydantic")
    # Some environments load setuptools' hook at every start.
    loaded = modules_after(f"import {module}; {module}.Client('amqp://localhost')") - modules_after("pass")
    foreign = {name for name in loaded - OURS if (found := distribution_of(name)) and not found & allowed}
    assert foreign == set()
    assert {"aio_pika", "pydantic"} <= loaded  # or nothing was measured


@pytest.mark.parametrize(
    "heavy", ["aiohttp", "boto3", "botocore", "dotenv", "prometheus_client", "rich", "structlog", "tenacity", "typer"]
)
def test_what_a_worker_needs_is_a_package_that_the_test_above_would_notice(heavy: str) -> None:
    assert distribution_of(heavy)
    assert not distribution_of(heavy) & with_requirements("aio-pika", "pydantic")
