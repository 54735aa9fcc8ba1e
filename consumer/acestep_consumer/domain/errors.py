# SPDX-License-Identifier: Apache-2.0
"""Errors that end a job. Each has its code, terminal state, verdict and public text.

::

    ConsumerError
    ├── Refused                 rejected, dead-lettered: the message itself is at fault
    │   ├── MessageTooLarge
    │   ├── MalformedBody
    │   ├── InvalidRequest      details: field, value, rule
    │   ├── LimitExceeded       on_limit = reject
    │   ├── TaskUnsupported
    │   └── InputNotAllowed
    ├── Failed                  failed, dead-lettered: it was tried and cannot be done
    │   ├── ModelUnavailable    on_model_unavailable = fail
    │   ├── LmUnavailable
    │   ├── PlanFailed
    │   ├── InputUnreadable
    │   ├── RenderFailed
    │   ├── ResourceExhausted
    │   ├── ExecutionTimeout
    │   ├── EngineCrashed       tried again first, up to the attempt limit
    │   ├── WorkerLost          likewise
    │   └── StorageUnavailable  waited for
    │       ├── StorageRefused      waited for as well: somebody may correct the keys
    │       │   └── StorageMisconfigured  the same, before anything was asked: profile, keys, certificate file
    │       └── ManifestUnreadable  not waited for: it stays as it is
    ├── Cancelled               cancelled, acked
    ├── Expired                 expired, dead-lettered: nobody wants it any more
    ├── PreviousOutcome         as an earlier attempt at this message ended
    ├── Unidentified            neither task id nor message id: it gets one before anything else
    └── Interrupted             no event, handed back: the worker stops, the next one takes the message
        ├── DiskFull            no event, handed back: this worker has no room for the job's files now
        ├── ScratchLost         no event, handed back: the folder with the job's files was removed
        ├── ForwardedToTier     no event, acked: a copy waits for a worker of a larger tier
        └── Identified          no event, acked: a copy with an id waits in its place
"""

import errno
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar, Final, Literal

from pydantic import JsonValue

from acestep_schemas.events import ErrorCode
from acestep_schemas.request import FieldProblem, problems_text

Status = Literal["failed", "rejected", "cancelled", "expired"]


class Verdict(StrEnum):
    """Settlement of the delivery once the terminal event is confirmed."""

    ACK = "ack"
    DEAD_LETTER = "dead-letter"
    REQUEUE = "requeue"


class ConsumerError(Exception):
    """Base of all. ``str(error)`` is the public text: it names what is wrong and holds no secret and no path."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    status: ClassVar[Status | None] = "failed"
    verdict: ClassVar[Verdict] = Verdict.DEAD_LETTER
    retryable: ClassVar[bool] = False
    attempts: int | None = None
    """How many tries it took, where somebody counted."""

    @property
    def details(self) -> tuple[dict[str, JsonValue], ...]:
        """Structured findings for the event; most errors have none."""
        return ()


class Refused(ConsumerError):
    """The message cannot be run by anyone as it is."""

    status = "rejected"


class MessageTooLarge(Refused):
    """The body is over the size limit (bytes)."""

    code = ErrorCode.MESSAGE_TOO_LARGE

    def __init__(self, size: int | None, limit: int) -> None:
        """``size`` None: it was not decompressed to its end."""
        has = "is over the limit once it is decompressed" if size is None else f"has {size:,} bytes"
        super().__init__(f"the message {has}; the limit is {limit:,} bytes")


class MalformedBody(Refused):
    """The body is not a JSON object that can be read safely."""

    code = ErrorCode.MALFORMED_BODY

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not a JSON object: {reason}")


class InvalidRequest(Refused):
    """One or more fields break a rule; ``problems`` names all of them."""

    code = ErrorCode.INVALID_REQUEST

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        super().__init__(problems_text(problems))
        self.problems = tuple(problems)

    @property
    def details(self) -> tuple[dict[str, JsonValue], ...]:
        """Field, value and rule of each problem."""
        return tuple(problem.model_dump(mode="json") for problem in self.problems)


class LimitExceeded(Refused):
    """The request exceeds the tier's limits and asked not to be clamped."""

    code = ErrorCode.LIMIT_EXCEEDED

    def __init__(self, message: str, exceeded: Sequence[dict[str, JsonValue]] = ()) -> None:
        super().__init__(message)
        self.exceeded = tuple(exceeded)

    @property
    def details(self) -> tuple[dict[str, JsonValue], ...]:
        """Field, requested and allowed value of each limit."""
        return self.exceeded


class TaskUnsupported(Refused):
    """The chosen model cannot do this task type."""

    code = ErrorCode.TASK_UNSUPPORTED


class InputNotAllowed(Refused):
    """An audio input names a place that the operator did not allow."""

    code = ErrorCode.INPUT_NOT_ALLOWED


class Failed(ConsumerError):
    """The job was tried and cannot be done."""


class ModelUnavailable(Failed):
    """The model is not loaded here and the request refused the fallback."""

    code = ErrorCode.MODEL_UNAVAILABLE
    retryable = True


class LmUnavailable(Failed):
    """The request needs the 5Hz language model and none is loaded."""

    code = ErrorCode.LM_UNAVAILABLE
    retryable = True


class PlanFailed(Failed):
    """The language model could not write what this job needs."""

    code = ErrorCode.PLAN_FAILED
    retryable = True


class InputUnreadable(Failed):
    """An audio input is missing, too large, too long or not audio."""

    code = ErrorCode.INPUT_UNREADABLE


class RenderFailed(Failed):
    """The pipeline refused the arguments or broke on them."""

    code = ErrorCode.RENDER_FAILED


class ResourceExhausted(Failed):
    """The card has too little memory for this job alone."""

    code = ErrorCode.RESOURCE_EXHAUSTED
    retryable = True


class ExecutionTimeout(Failed):
    """The job ran longer than the operator allows."""

    code = ErrorCode.EXECUTION_TIMEOUT
    retryable = True


class EngineCrashed(Failed):
    """The engine process died with this job inside."""

    code = ErrorCode.ENGINE_CRASHED
    retryable = True


class WorkerLost(EngineCrashed):
    """The whole worker died with this job inside, as often as it may; ``tries`` are all that were made."""

    def __init__(self, unexplained: int, tries: int) -> None:
        super().__init__(f"the worker died {unexplained} times while running this job")
        self.tries = tries


class StorageUnavailable(Failed):
    """S3 could not be reached, or refused, for longer than the worker waits."""

    code = ErrorCode.STORAGE_UNAVAILABLE
    retryable = True


class StorageRefused(StorageUnavailable):
    """The storage answered, and another try would get the same answer.

    Attributes:
        reason: the storage's own code for it, or the HTTP status.
        missing: whether the answer means that there is no such object.
    """

    def __init__(self, address: object, reason: str, *, hint: str | None = None, missing: bool = False) -> None:
        super().__init__(f"{address}: {reason}" + (f" ({hint})" if hint else ""))
        self.reason = reason
        self.missing = missing


WRONG_KEYS: Final = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}
)
"""Reasons of a ``StorageRefused`` that lie in the worker's own keys or clock."""


class StorageMisconfigured(StorageRefused):
    """The AWS environment is wrong or incomplete: profile, keys, certificate file."""

    def __init__(self, message: str) -> None:
        ConsumerError.__init__(self, message)
        self.reason = "misconfigured"
        self.missing = False


class ManifestUnreadable(StorageUnavailable):
    """The job's manifest cannot be read: something else lies in its place."""


class Cancelled(ConsumerError):
    """Somebody asked for this job to stop."""

    code = ErrorCode.CANCELLED
    status = "cancelled"
    verdict = Verdict.ACK

    def __init__(self) -> None:
        super().__init__("cancelled on request")


class Expired(ConsumerError):
    """The request waited in the queue for longer than its producer allows."""

    code = ErrorCode.EXPIRED
    status = "expired"


class PreviousOutcome(ConsumerError):
    """Outcome of an earlier try of the same message, read from storage."""

    def __init__(self, code: ErrorCode, message: str, attempts: int | None = None) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # each has another
        self.attempts = attempts


class Interrupted(ConsumerError):
    """The worker stops before the job is done: no event, the message goes back to the queue."""

    status = None
    verdict = Verdict.REQUEUE


class DiskFull(Interrupted):
    """The scratch disk of this worker is full: its own trouble and not the job's."""

    def __init__(self) -> None:
        super().__init__("the worker's scratch disk is full")

    @classmethod
    def caused(cls, error: BaseException) -> bool:
        """Whether a full disk, or a full quota, is what this error is or was raised from."""
        if isinstance(error, cls) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            return True
        return error.__cause__ is not None and cls.caused(error.__cause__)


class ScratchLost(Interrupted):
    """The worker's folder for temporary files is gone: its own trouble and not the job's."""

    def __init__(self) -> None:
        super().__init__("the worker's scratch folder was removed or cannot be made")


class ForwardedToTier(Interrupted):
    """A copy of the message waits for a worker with a larger card, confirmed by the broker."""

    verdict = Verdict.ACK

    def __init__(self, tier: str) -> None:
        super().__init__(f"forwarded to {tier}")


class Unidentified(ConsumerError):
    """The message has neither a task id nor a message id, so a redelivery could not be recognised."""

    def __init__(self) -> None:
        super().__init__("the message has neither task_id nor message_id")


class Identified(Interrupted):
    """A copy of the message with a message id is in the queue, confirmed by the broker."""

    verdict = Verdict.ACK

    def __init__(self) -> None:
        super().__init__("published again with a message id")


class Unpublished(Exception):
    """An event could not be confirmed: the delivery must not be settled as done."""


def error_of_code(code: ErrorCode, text: str, problems: Sequence[FieldProblem] = ()) -> ConsumerError:
    """Rebuild an error that crossed a process boundary as its code, its public text and the fields at fault."""
    if code is ErrorCode.CANCELLED:
        return Cancelled()
    if code is ErrorCode.INVALID_REQUEST:
        return InvalidRequest(problems)
    kinds: tuple[type[ConsumerError], ...] = (LimitExceeded, TaskUnsupported, *Failed.__subclasses__())
    return {kind.code: kind for kind in kinds}.get(code, ConsumerError)(text)
