# SPDX-License-Identifier: Apache-2.0
"""Exit codes of the commands, and the one place that turns a client error into one."""

from enum import IntEnum

from rich.console import Console

from consumer.client import ClientError, QueueFull


class Exit(IntEnum):
    """Exit codes, as documented in ``acestep-consumer --help``."""

    DONE = 0
    JOB_FAILED = 1
    USAGE = 2
    QUEUE_FULL = 3
    UNREACHABLE = 4
    ENGINE = 5
    INTERRUPTED = 130


def refused(error: ClientError, note: Console) -> Exit:
    """Say what went wrong and choose the exit code."""
    note.print(str(error), style="red", markup=False)
    return Exit.QUEUE_FULL if isinstance(error, QueueFull) else Exit.UNREACHABLE
