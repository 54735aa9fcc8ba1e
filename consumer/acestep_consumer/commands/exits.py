# SPDX-License-Identifier: Apache-2.0
"""Exit codes of the commands: the one list, and the one place that turns a client error into one."""

from enum import IntEnum
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from acestep_consumer.client import ClientError


class Exit(IntEnum):
    """Exit codes of all commands. What each means to a caller is in ``MEANINGS``."""

    DONE = 0
    JOB_FAILED = 1
    USAGE = 2
    QUEUE_FULL = 3
    UNREACHABLE = 4
    ENGINE = 5
    UNFIT = 6
    INTERRUPTED = 130


MEANINGS = {
    Exit.DONE: "done",
    Exit.JOB_FAILED: "the job ended without songs",
    Exit.USAGE: "usage or settings",
    Exit.QUEUE_FULL: "queue full",
    Exit.UNREACHABLE: "broker, storage or worker out of reach",
    Exit.ENGINE: "an engine cannot work",
    Exit.UNFIT: "`doctor` found something that stops a worker",
    Exit.INTERRUPTED: "interrupted",
}


def listed() -> str:
    """Return all codes with their meanings, in one line."""
    return "Exit codes: " + " · ".join(f"{code:d} {meaning}" for code, meaning in MEANINGS.items()) + "."


def refused(error: "ClientError", note: Console) -> Exit:
    """Say what went wrong and choose the exit code."""
    # Half a second, and `--help` and completion need no client.
    from acestep_consumer.client import InvalidTaskId, QueueFull  # noqa: PLC0415 - as said above

    note.print(str(error), style="red", markup=False, soft_wrap=True)
    match error:
        case InvalidTaskId():
            return Exit.USAGE
        case QueueFull():
            return Exit.QUEUE_FULL
    return Exit.UNREACHABLE
