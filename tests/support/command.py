# SPDX-License-Identifier: Apache-2.0
"""The command line as a person calls it, in a process of its own."""

import subprocess

from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, clean_environment

"""Far more than any takes: a command that hangs fails its test instead of holding up the others."""


def run_command(
    *arguments: str, variables: dict[str, str], text: str | None = None, within_s: float = WITHIN_S
) -> "subprocess.CompletedProcess[str]":
    """Run ``acestep-consumer`` to its end, with these settings and no others; ``text`` is its standard input."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=clean_environment(variables),
        cwd=ROOT,
        input=text,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
