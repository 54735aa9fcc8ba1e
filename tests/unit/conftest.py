# SPDX-License-Identifier: Apache-2.0
"""Hypothesis without time limits for all unit tests: a busy machine is no fault of the code under test."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support import fork_server

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="module")
def forked_processes() -> Iterator[None]:
    """Start commands and engines as forks, for files that start dozens: each spares a second of imports."""
    with fork_server.forking():
        yield
