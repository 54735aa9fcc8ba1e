# SPDX-License-Identifier: Apache-2.0
"""What a program that wants songs has to expect. Each text says what happened and what to do.

::

    ClientError
    ├── InvalidTaskId   no job can have this id; nothing was sent; a ValueError too
    ├── QueueFull       nothing was accepted; retry_after says when to try again
    ├── NoQueue         nobody has declared the queues yet
    ├── Unreachable     the broker cannot be reached, or refuses the login
    ├── NotEndedYet     the wait was over before the job was; a TimeoutError too
    ├── NoSongs         the job ended without songs; event says why
    └── DownloadFailed  a song could not be had, or is not what the event describes
"""

from acestep_schemas.events import JobCompleted, TerminalEvent


class ClientError(Exception):
    """Base of all; the text says what happened and what to do."""


class InvalidTaskId(ClientError, ValueError):
    """No job can have this id: nothing was sent, since nobody could follow or cancel what would come of it."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"{task_id!r} is no task id: 1 to 128 letters, digits, - and _")


class QueueFull(ClientError):
    """The queue holds as many requests as it may; nothing was accepted.

    Attributes:
        retry_after: seconds until there is likely to be room: one job's time over the number of workers, where this
            client has heard a job end, else a guess; a random quarter longer, so that refused producers spread out.
        waiting: requests in the queue; None when this login may not ask.
        workers: workers that consume it; None as above.
    """

    def __init__(self, retry_after: float, waiting: int | None = None, workers: int | None = None) -> None:
        super().__init__(_full(waiting, workers) + f"; try again in {retry_after:.0f} s")
        self.retry_after = retry_after
        self.waiting = waiting
        self.workers = workers


class NoQueue(ClientError):
    """Nobody has declared the queues yet."""


class Unreachable(ClientError):
    """The broker cannot be reached or refuses the login."""


class NotEndedYet(ClientError, TimeoutError):
    """The job goes on; only the wait for it is over."""


class NoSongs(ClientError):
    """The job ended without songs. ``event`` is its terminal event."""

    def __init__(self, event: TerminalEvent) -> None:
        super().__init__(f"{event.subject} ended as {event.data.status}{_why(event)}")
        self.event = event


class DownloadFailed(ClientError):
    """A song could not be had, or is not what the event describes."""


def _full(waiting: int | None, workers: int | None) -> str:
    text = "the queue is full: the request was not accepted"
    if waiting is None or workers is None:
        return text
    if not workers:
        return f"{text}; {waiting} wait and no worker consumes: start one with `acestep-consumer run`"
    return f"{text}; {waiting} wait for {workers} worker{'' if workers == 1 else 's'}"


def _why(event: TerminalEvent) -> str:
    if isinstance(event, JobCompleted):
        return ": the request asked for metadata alone" if event.data.request.analysis_only else ""
    return f": {event.data.error.code}: {event.data.error.message}"
