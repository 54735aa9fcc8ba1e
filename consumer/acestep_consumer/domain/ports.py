# SPDX-License-Identifier: Apache-2.0
"""Ports that the pipeline needs, as Protocols. Adapters implement them; unit tests use fakes of them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from acestep_consumer.domain.errors import ConsumerError, Verdict
from acestep_consumer.domain.job import Attempt, Job, Plan, Rendering, Request, Sources, StoredObject, TokenizedSource
from acestep_consumer.domain.objects import ByteRange, ObjectAddress, ObjectContent, ObjectHead, SmallObject, Traffic
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_schemas.events import JobEvent

Report = Callable[[float, str], None]
"""Tell how far a stage is: fraction 0 to 1, and the stage's name. Never blocks, never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFormat:
    """AMQP's properties that say how a body is written.

    Attributes:
        content_type: JSON (also ``+json``), or a form; None: JSON.
        content_encoding: ``gzip`` and ``deflate`` are read.
    """

    content_type: str | None = None
    content_encoding: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The AMQP properties that an event echoes.

    Attributes:
        reply_to: a queue that gets the terminal event too.
        correlation_id: set on every event of the job.
    """

    reply_to: str | None = None
    correlation_id: str | None = None


class Delivery(Protocol):
    """One delivered message. It is settled exactly once, last."""

    @property
    def body(self) -> bytes:
        """The message's bytes as they came."""

    @property
    def message_id(self) -> str | None:
        """AMQP ``message_id``."""

    @property
    def body_format(self) -> BodyFormat:
        """Content type and encoding of the body."""

    @property
    def priority(self) -> int:
        """AMQP ``priority``, 0 to 9; higher ones go first."""

    @property
    def queued_s(self) -> float | None:
        """Seconds since the producer's ``timestamp``, when it set one."""

    @property
    def sent(self) -> datetime | None:
        """The producer's ``timestamp``, when it set one."""

    @property
    def redelivered(self) -> bool:
        """Whether somebody had this message before and did not settle it."""

    @property
    def expires(self) -> bool:
        """Whether the broker may give the message up, also when it is requeued because a worker was cut off."""

    @property
    def fingerprint(self) -> str:
        """The same for each delivery of this message, another for another message: letters and digits."""

    @property
    def traceparent(self) -> str | None:
        """The header of that name (W3C Trace Context), when there is a valid one."""

    @property
    def stale(self) -> bool:
        """Whether the broker has taken the message back, so that another worker may have it."""

    @property
    def tier(self) -> str | None:
        """The tier whose queue it was forwarded to; None: it comes from the producers' queue."""

    @property
    def visited_tiers(self) -> tuple[str, ...]:
        """All tiers that it was forwarded to so far."""

    async def forward(self, tier: str) -> bool:
        """Publish a copy to the queue of that tier, confirmed. False: no worker is there, or there is no room.

        Raises ``Unpublished`` when nobody knows.
        """

    async def identify(self) -> None:
        """Publish a copy with a message id, confirmed, which is consumed before the rest of the queue.

        For a message without any id. Raises ``Unpublished`` when the confirm is missing.
        """

    @property
    def reply(self) -> Reply:
        """The AMQP properties that the job's events echo."""

    async def settle(self, verdict: Verdict, reason: ConsumerError | None = None) -> None:
        """Ack, requeue, or move to the dead-letter exchange with the reason. A stale delivery is left alone."""


class Events(Protocol):
    """Publishes events."""

    async def publish(self, event: JobEvent, reply: Reply) -> None:
        """Publish and wait for the broker's confirm. Raises ``Unpublished``."""


class ObjectStream(Protocol):
    """An object, or a part of it, while it is read. An interrupted read goes on where it stopped."""

    @property
    def size(self) -> int:
        """Bytes of the whole object."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the bytes, in chunks of at most a megabyte. Raises what the calls of ``Objects`` raise."""


class Objects(Protocol):
    """An object storage. Everything that reads or writes objects uses it; each adapter is a folder of ``storage``.

    Failures that may pass are retried inside. Then each call raises ``StorageUnavailable``: out of reach for longer
    than that, or its subclass ``StorageRefused``: it answered, and another try would get the same answer.
    """

    @property
    def traffic(self) -> Traffic:
        """Counts what all calls send and receive."""

    async def get(self, address: ObjectAddress) -> SmallObject | None:
        """Return a small object; None when there is none."""

    def open(self, address: ObjectAddress, span: ByteRange | None = None) -> AbstractAsyncContextManager[ObjectStream]:
        """Open an object for reading, or ``span`` of it. A missing object is ``StorageRefused`` with ``missing``."""

    async def head(self, address: ObjectAddress) -> ObjectHead | None:
        """Return what is known of an object; None when there is none."""

    async def put(self, address: ObjectAddress, content: ObjectContent, *, only_new: bool = False) -> bool:
        """Write an object, in place of one that is there unless ``only_new``.

        Returns:
            False when ``only_new`` and one is there. It may be our own, written by an attempt whose answer was lost.
        """

    async def replace(self, address: ObjectAddress, content: ObjectContent, etag: str) -> bool:
        """Write a small object in place of the one with this ETag. False: it is another one by now."""

    async def delete(self, address: ObjectAddress) -> None:
        """Delete an object; a missing one is no error."""

    def list(self, prefix: ObjectAddress) -> AsyncIterator[ObjectAddress]:
        """Yield the addresses of all objects whose key starts with that of ``prefix``, in the order of their keys."""

    async def presign(self, address: ObjectAddress, lifetime_s: int) -> str:
        """Return a URL that lets whoever has it read the object for ``lifetime_s`` seconds."""

    async def has_bucket(self, bucket: str) -> bool:
        """Whether the bucket exists and lets us in: the cheapest question that needs valid keys."""

    async def make_bucket(self, bucket: str) -> None:
        """Create a bucket; one that we own already is no error."""

    async def check_conditions(self, address: ObjectAddress) -> None:
        """Find out, at an existing object, whether ``only_new`` is atomic here; warn if not. May replace the object."""


class Store(Protocol):
    """Storage of results."""

    async def find(self, task_id: str) -> TerminalRecord | None:
        """Return how a task ended, if it did. Raises ``StorageUnavailable``."""

    async def put(self, job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        """Upload the tracks under their final keys. Raises ``StorageUnavailable``."""

    async def missing(self, record: TerminalRecord) -> bool:
        """Whether audio of a completed task has been deleted or replaced. Raises ``StorageUnavailable``."""

    async def commit(self, record: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        """Write a task's terminal record, and return the one in force. Raises ``StorageUnavailable``.

        A completed task stays completed; a completed record replaces one without songs; of two without songs, the
        latest message's counts. ``instead_of`` is the earlier record that this one was made in place of: songs whose
        audio is gone are replaced by new ones, and by nothing else.
        """


class Routes(Protocol):
    """Forwards requests to workers that can do more of them."""

    async def forward(self, request: Request, delivery: Delivery) -> None:
        """Hand the message to another worker where that is better. Raises ``ForwardedToTier`` then.

        Raises ``Interrupted`` when nobody knows whether it got there.
        """


class AttemptStore(Protocol):
    """Records the attempts of redelivered messages, and of those that may expire."""

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the attempt that comes next; nothing is written. Raises ``StorageUnavailable``."""

    async def begin(self, attempt: Attempt, *, expires: bool) -> None:
        """Record that the attempt begins now; the first one only if its message ``expires``.

        Raises ``StorageUnavailable``.
        """

    async def renew(self, attempt: Attempt, count: int) -> None:
        """Record that the attempt goes on though its message was taken back, and is excused.

        ``count`` is another one each time. Raises ``StorageUnavailable``.
        """

    async def excuse(self, attempt: Attempt) -> None:
        """Record that the attempt ended through no fault of the message. Raises ``StorageUnavailable``."""

    async def unfinished(self, task_id: str, message: str, *, delivered: bool) -> tuple[bytes, ...]:
        """Return what is known of attempts that may go on; it changes when one is renewed. Empty: none does.

        ``delivered``: there was a first attempt, recorded or not. Raises ``StorageUnavailable``.
        """

    async def forget(self, task_id: str, message: str) -> None:
        """Remove the records of a message that has ended. Raises ``StorageUnavailable``."""


class Cancellations(Protocol):
    """Cancellations of jobs."""

    async def wait(self, task_id: str, sent: datetime | None) -> None:
        """Return once somebody has asked to cancel the task, after the message was ``sent``; maybe never."""


class SourceSongs(Protocol):
    """Finds the songs of earlier tasks that requests name."""

    async def resolve(self, request: Request) -> Request:
        """Return the request with what follows from the song that it names, and from its edits.

        Raises ``InvalidRequest``, ``InputNotAllowed``, ``InputUnreadable``.
        """


class Inputs(Protocol):
    """Fetches the audio inputs and the LoRA of a job."""

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's inputs into ``folder``. Raises ``InputNotAllowed``, ``InputUnreadable``."""


class Planner(Protocol):
    """Plans songs: fills in metadata and audio codes."""

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:
        """Return the plan. Raises ``LmUnavailable`` and other ``Failed`` errors."""


class Renderer(Protocol):
    """Makes the songs and encodes them into the job's scratch folder."""

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Return encoded tracks. Cancelling the call stops the work at the next step. Raises ``Failed`` errors."""

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        """Return the source audio as audio codes, for analysis. Raises ``Failed`` errors."""
