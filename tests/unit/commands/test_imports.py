# SPDX-License-Identifier: Apache-2.0
"""A command answers at once: those of jobs, queues and plans load nothing heavy that they do not use."""

import subprocess
import sys

from tests.support.waiting import WITHIN_S

COMMANDS = (
    "cancel",
    "check",
    "dead.run",
    "models.run",
    "plan.run",
    "status.run",
    "submit.run",
    "topology",
    "watch",
)
# aiohttp reads the certificate authorities while it is imported; structlog imports what it prints tracebacks with.
HEAVY = {"aiohttp", "boto3", "botocore", "numpy", "opentelemetry", "prometheus_client", "structlog", "torch"}


def test_commands_import_neither_torch_nor_aiohttp_nor_boto3() -> None:
    imports = ", ".join(f"acestep_consumer.commands.{name}" for name in COMMANDS)
    code = f"import sys, acestep_consumer.cli, {imports}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S, check=True)
    loaded = set(done.stdout.split())
    assert "acestep_consumer.commands.status.run" in loaded
    assert HEAVY & loaded == set()
