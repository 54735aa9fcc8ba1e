# SPDX-License-Identifier: Apache-2.0
"""Client errors as exit codes: prints what went wrong and chooses the code."""

from typing import TYPE_CHECKING

from rich.console import Console

from acestep_consumer.config.exit_codes import Exit

if TYPE_CHECKING:
    from acestep_consumer.client import ClientError


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
