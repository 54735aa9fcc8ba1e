# SPDX-License-Identifier: Apache-2.0
"""Errors of the client. Each text says what happened and what to do.

::

    ClientError
    ├── InvalidTaskId          the id is malformed; nothing was sent; a ValueError too
    ├── QueueFull              the request was not accepted; retry_after says when to try again
    ├── NoQueue                the queues are not declared yet
    ├── Unreachable            the broker is unreachable, or refuses the login
    ├── NotEndedYet            the wait is over and the job goes on, or no such job is known; a TimeoutError too
    ├── NoSongs                the job ended without songs; event and code say why
    │   ├── JobFailedError
    │   ├── JobRejectedError
    │   ├── JobCancelledError
    │   └── JobExpiredError
    └── DownloadFailed         a song could not be fetched, or is not the one that the event describes
"""

from acestep_schemas.events import ErrorCode, JobCompleted, TerminalEvent


class ClientError(Exception):
    """Base of all errors of the client.

    Attributes:
        accepted: set by ``submit_many``: for each request in turn its task id, or None where it was not accepted.
    """

    accepted: tuple[str | None, ...] = ()


class InvalidTaskId(ClientError, ValueError):
    """The task id is malformed. Nothing was sent, since nobody could follow or cancel the job."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"{task_id!r} is no task id: 1 to 128 letters, digits, - and _")


class QueueFull(ClientError):
    """The queue is at its limit; the request was not accepted.

    Attributes:
        retry_after: seconds until there is likely to be room: one job's time over the number of workers, where this
            client knows how long jobs take, else a guess; up to a quarter longer at random, so that refused producers
            spread out.
        waiting: requests in the queue; None when this login may not ask.
        workers: consumers of the queue; if there are none, workers that are busy or paused; None as above.
    """

    def __init__(self, retry_after: float, waiting: int | None = None, workers: int | None = None) -> None:
        super().__init__(_full(waiting, workers) + f"; try again in {retry_after:.0f} s")
        self.retry_after = retry_after
        self.waiting = waiting
        self.workers = workers


class NoQueue(ClientError):
    """The queues are not declared yet."""


class Unreachable(ClientError):
    """The broker is unreachable, or refuses the login."""


class NotEndedYet(ClientError, TimeoutError):
    """The wait is over before the job is; the job goes on."""


class NoSongs(ClientError):
    """The job ended without songs.

    Raised itself only where the request asked for no audio; else one of its subclasses, which tell how the job ended.

    Attributes:
        event: the job's terminal event.
        code: why, as an ``ErrorCode`` such as ``invalid_request``; None for a job that completed.
    """

    def __init__(self, event: TerminalEvent) -> None:
        super().__init__(_without_songs(event))
        self.event = event
        self.code: ErrorCode | None = None if event.state == "completed" else event.data.error.code


class JobFailedError(NoSongs):
    """The job was started and could not be finished."""

    code: ErrorCode


class JobRejectedError(NoSongs):
    """The job was not started, because the request is at fault."""

    code: ErrorCode


class JobCancelledError(NoSongs):
    """Somebody asked for the job to stop."""

    code: ErrorCode


class JobExpiredError(NoSongs):
    """The request waited longer than its deadline allows."""

    code: ErrorCode


class DownloadFailed(ClientError):
    """A song could not be fetched, or is not the one that the event describes."""


_BY_STATE: dict[str, type[NoSongs]] = {
    "failed": JobFailedError,
    "rejected": JobRejectedError,
    "cancelled": JobCancelledError,
    "expired": JobExpiredError,
}


def no_songs(event: TerminalEvent) -> NoSongs:
    """Return the error for a job that ended without songs."""
    return _BY_STATE.get(event.state, NoSongs)(event)


def _full(waiting: int | None, workers: int | None) -> str:
    text = "the queue is full: the request was not accepted"
    if waiting is None or workers is None:
        return text
    if not workers:
        return f"{text}; {waiting} wait and no worker consumes: start one with `acestep-consumer run`"
    return f"{text}; {waiting} wait for {workers} worker{'' if workers == 1 else 's'}"


def _without_songs(event: TerminalEvent) -> str:
    if isinstance(event, JobCompleted):
        asked = ": the request asked for metadata alone" if event.data.request.analysis_only else ""
        return f"{event.subject} completed without songs{asked}"
    error = event.data.error
    match event.state:
        case "cancelled":
            return f"{event.subject} was cancelled"
        case "rejected":
            return f"{event.subject} was rejected: {error.code}: {error.message}"
        case "expired":
            return f"{event.subject} expired: {error.message}"
    return f"{event.subject} failed: {error.code}: {error.message}"
