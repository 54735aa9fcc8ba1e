# SPDX-License-Identifier: Apache-2.0
"""Whether the broker is there and somebody takes requests: what a page says when nothing happens."""

from pydantic import BaseModel, ConfigDict


class Pulse(BaseModel):
    """The request queue at one moment.

    Attributes:
        broker: it answers.
        declared: the queue is there.
        waiting: requests that no worker has in hand, in it or, sent on, in the queue of a tier; None when this login
            may not look.
        workers: how many take requests from it; None as above.
    """

    model_config = ConfigDict(frozen=True)

    broker: bool
    declared: bool = True
    waiting: int | None = None
    workers: int | None = None
