# SPDX-License-Identifier: Apache-2.0
"""Exit codes of all commands, and their meanings for ``--help`` and the docs."""

import traceback
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of all commands; ``MEANINGS`` describes them."""

    DONE = 0
    JOB_FAILED = 1
    USAGE = 2
    QUEUE_FULL = 3
    UNREACHABLE = 4
    ENGINE = 5
    UNFIT = 6
    UNEXPECTED = 70
    INTERRUPTED = 130
    READER_GONE = 141


MEANINGS = {
    Exit.DONE: "done",
    Exit.JOB_FAILED: "no songs: the job failed, was cancelled or did not end in time, or would be rejected (`check`)",
    Exit.USAGE: "wrong usage or settings",
    Exit.QUEUE_FULL: "queue full",
    Exit.UNREACHABLE: "broker, storage, worker or model hub unreachable",
    Exit.ENGINE: "the engine is unusable, or a model cannot be downloaded in full",
    Exit.UNFIT: "`doctor` found a problem that stops a worker, or `models verify` a damaged file",
    Exit.UNEXPECTED: "unexpected error, probably a bug; `ACESTEP_LOG_LEVEL=debug` shows where",
    Exit.INTERRUPTED: "stopped with Ctrl-C",
    Exit.READER_GONE: "nobody reads the output any more, as after `head`",
}


def listed() -> str:
    """Return all codes and meanings in one line."""
    return "Exit codes: " + " · ".join(f"{code:d} {meaning}" for code, meaning in MEANINGS.items()) + "."


def unexpected(error: Exception) -> str:
    """Return an unforeseen error as one line: its type, its text, and the line of this program that met it."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "acestep_" in frame.filename]
    where = f" (acestep_{ours[-1].filename.rpartition('acestep_')[2]}:{ours[-1].lineno})" if ours else ""
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{where}"
