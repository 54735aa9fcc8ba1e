# SPDX-License-Identifier: Apache-2.0
"""What the story needs from the outside, as Protocols. Adapters implement them; unit tests use fakes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from acestep_consumer.domain.errors import ConsumerError, Verdict
from acestep_consumer.domain.job import Attempt, Job, Plan, Rendering, Request, Sources, StoredObject, TokenizedSource
from acestep_consumer.domain.outcome import TerminalRecord
from acestep_schemas.events import JobEvent

Report = Callable[[float, str], None]
"""Tell how far a stage is: fraction 0 to 1, and the stage's name. Never blocks, never raises."""


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
    def queued_s(self) -> float | None:
        """Seconds since the producer's ``timestamp``, when it set one."""

    @property
    def sent(self) -> datetime | None:
        """The producer's ``timestamp``, when it set one."""

    @property
    def redelivered(self) -> bool:
        """Whether somebody had this message before and did not settle it."""

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
        """The tier whose queue it was sent on to; None: it comes from the producers' queue."""

    async def forward(self, tier: str) -> bool:
        """Publish a copy to the queue of that tier, confirmed. False: no worker is there, or there is no room.

        Raises ``Unpublished`` when nobody knows.
        """

    @property
    def reply(self) -> Reply:
        """The AMQP properties that the job's events echo."""

    async def settle(self, verdict: Verdict, reason: ConsumerError | None = None) -> None:
        """Ack, requeue, or move to the dead-letter exchange with the reason. A stale delivery is left alone."""


class Events(Protocol):
    """The way out to subscribers."""

    async def publish(self, event: JobEvent, reply: Reply) -> None:
        """Publish and wait for the broker's confirm. Raises ``Unpublished``."""


class Store(Protocol):
    """S3-compatible storage of results."""

    async def find(self, task_id: str) -> TerminalRecord | None:
        """Return how a task ended, if it did. Raises ``StorageUnavailable``."""

    async def put(self, job: Job, rendering: Rendering) -> tuple[StoredObject, ...]:
        """Upload the tracks under their final keys. Raises ``StorageUnavailable``."""

    async def commit(self, kept: TerminalRecord, instead_of: TerminalRecord | None = None) -> TerminalRecord:
        """Write down how a task ended, unless that is written; return what is. Raises ``StorageUnavailable``.

        ``instead_of`` is an earlier end to replace.
        """


class Routes(Protocol):
    """Knows who else could do a request."""

    async def send_on(self, request: Request, delivery: Delivery) -> None:
        """Hand the message to another worker where that is better. Raises ``SentOn`` then.

        Raises ``Interrupted`` when nobody knows whether it got there.
        """


class AttemptStore(Protocol):
    """Remembers the tries of messages that came again."""

    async def next(self, task_id: str, message: str, *, redelivered: bool) -> Attempt:
        """Return the try that comes next; nothing is written. Raises ``StorageUnavailable``."""

    async def begin(self, attempt: Attempt) -> None:
        """Write down that the try begins now. Raises ``StorageUnavailable``."""

    async def excuse(self, attempt: Attempt) -> None:
        """Write down that the try was ended through no fault of the message. Raises ``StorageUnavailable``."""


class Cancellations(Protocol):
    """Knows whose work nobody wants any more."""

    async def wait(self, task_id: str, sent: datetime | None) -> None:
        """Return once somebody has asked to cancel the task, after the message was ``sent``; maybe never."""


class Inputs(Protocol):
    """The way in for audio."""

    async def fetch(self, job: Job, folder: Path) -> Sources:
        """Copy the job's audio inputs into ``folder``. Raises ``InputNotAllowed``, ``InputUnreadable``."""


class Planner(Protocol):
    """Fills in what the request leaves open."""

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:
        """Return the plan. Raises ``LmUnavailable`` and other ``Failed`` errors."""


class Renderer(Protocol):
    """Makes the songs and encodes them into the job's scratch folder."""

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Return encoded tracks. Cancelling the call stops the work at the next step. Raises ``Failed`` errors."""

    async def listen(self, job: Job, sources: Sources) -> TokenizedSource:
        """Return the source audio as audio codes, for analysis. Raises ``Failed`` errors."""
