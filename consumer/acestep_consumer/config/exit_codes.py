# SPDX-License-Identifier: Apache-2.0
"""Exit codes of all commands, with their meanings: the one list."""

from enum import IntEnum


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
