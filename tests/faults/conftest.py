# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fault tests: the same real worker as in the integration tests."""

from tests.integration.conftest import forked_processes, fresh_processes, own_worker_environment, tiny_checkpoints

__all__ = ["forked_processes", "fresh_processes", "own_worker_environment", "tiny_checkpoints"]
