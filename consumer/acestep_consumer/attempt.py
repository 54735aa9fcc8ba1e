# SPDX-License-Identifier: Apache-2.0
"""One try of a message."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A try of a message.

    ``message`` is the message's fingerprint, ``number`` counts from 1, ``unexplained`` are the earlier tries after
    which nobody was left to say why they ended.
    """

    task_id: str
    message: str
    number: int = 1
    unexplained: int = 0
