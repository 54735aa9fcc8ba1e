# SPDX-License-Identifier: Apache-2.0
"""SIGHUP has two senders: an operator who wants settings read again, and a terminal that goes."""

import os

_STDERR = 2


class Terminal:
    """The terminal that this process writes to, if it does; looked at when this is made."""

    def __init__(self) -> None:
        self._had_one = _is_terminal()

    def gone(self) -> bool:
        """Whether it was there and is no more: the kernel takes it away before it sends SIGHUP."""
        return self._had_one and not _is_terminal()


def _is_terminal() -> bool:
    return os.isatty(_STDERR)
