# SPDX-License-Identifier: Apache-2.0
"""How a task ended, as it is kept beside its songs: one record a task, whether it has songs or not."""

from dataclasses import dataclass

from acestep_schemas.events import Completed, Unfinished

Ending = Completed | Unfinished


@dataclass(frozen=True, slots=True)
class Kept:
    """The record of it. ``message`` is the fingerprint of the message that it answers; None: not known.

    ``traceparent`` is the trace that the work belonged to: an event that is told again belongs to it as well.
    """

    ending: Ending
    message: str | None = None
    traceparent: str | None = None

    def answers(self, message: str, *, same: bool) -> bool:
        """Whether this is how ``message`` ended.

        Songs answer every message that asks for their task. An end without songs answers the one message that came to
        it: whoever sends a failed task anew wants another try. ``same`` says that an equal fingerprint can only be
        that one message come again.
        """
        return isinstance(self.ending, Completed) or (same and self.message == message)
