# SPDX-License-Identifier: Apache-2.0
"""Errors of the broker. The only place where exceptions of aio-pika and aiormq are mapped to these.

::

    BrokerError
    ├── ConnectionLost  connection or channel closed, or no answer in time: try again on the next one
    ├── Nacked          the broker refused to store the message, for now
    ├── Unroutable      no queue takes the message
    └── BrokerRefused   password, virtual host, permission, other arguments: a person has to act
"""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from aio_pika import exceptions as amqp
from aiormq.exceptions import ChannelAccessRefused
from pamqp.exceptions import PAMQPException

from acestep_consumer.config.amqp_urls import ENCODING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator


class BrokerError(Exception):
    """Base of all errors of the broker."""


class ConnectionLost(BrokerError):
    """The connection or the channel was closed, or the broker did not answer in time."""


class Nacked(BrokerError):
    """The broker refused the message on its publisher confirm: a queue is full or could not store it."""


class Unroutable(BrokerError):
    """No queue takes the message, or its routing key cannot be written as AMQP."""


class BrokerRefused(BrokerError):
    """The broker refuses an operation, and will refuse it again; the text says what to change."""


# RuntimeError: aiormq's ChannelInvalidStateError, and what asyncio makes of a StopAsyncIteration at a stream's end.
_LOSS = (amqp.AMQPError, PAMQPException, OSError, RuntimeError)


_PORT = "check that the port in ACESTEP_AMQP_URL is that of AMQP: 5672, or 5671 for amqps://"
# What aiormq says of a server whose first bytes are not those of a frame: it reads a length from them.
_EXPECTED = re.compile(r"but (\d+) bytes expected")
_LARGEST_GREETING = 65_536


@contextmanager
def mapped() -> Iterator[None]:
    """Turn the exceptions of aio-pika and aiormq into ``BrokerError``; a real cancellation passes.

    One that the body lost is raised at its end, or a loop would never stop: aiormq turns some into other exceptions,
    and ``asyncio.wait_for``, which it uses, returns normally in Python 3.11 if its awaitable ends at the same moment.
    """
    before = _cancellations()
    try:
        yield
    except asyncio.CancelledError as error:
        # aiormq cancels whatever waits on a channel that it closes. This task was not asked to stop, so it is a loss.
        if _cancellations():
            raise
        raise ConnectionLost("the channel was closed") from error
    except Exception as error:
        if _cancellations() > before:
            raise asyncio.CancelledError from error
        found = _mapped(error)
        if found is error:
            raise
        raise found from error
    if _cancellations() > before:
        raise asyncio.CancelledError


async def end_within(timeout_s: float, closing: Awaitable[object]) -> None:
    """Wait until a connection or a channel is closed, but no longer than that, and whatever the broker answers."""
    with suppress(BrokerError), mapped():
        async with asyncio.timeout(timeout_s):
            await closing


@contextmanager
def connecting(timeout_s: float) -> Iterator[None]:
    """As ``mapped``, for the handshake: a server that answers nothing, or not as AMQP does, is told as that.

    It stays a ``ConnectionLost``: a proxy may answer so as long as the broker behind it is away.
    """
    try:
        with mapped():
            yield
    except ConnectionLost as loss:
        if isinstance(loss.__cause__, TimeoutError):
            raise ConnectionLost(f"no AMQP greeting within {timeout_s:g} s; {_PORT}") from loss.__cause__
        if "WRONG_VERSION_NUMBER" in str(loss):
            raise ConnectionLost(f"what answers does not speak TLS; {_PORT}") from loss.__cause__
        expected = _EXPECTED.search(str(loss))
        if expected is not None and int(expected[1]) > _LARGEST_GREETING:
            raise ConnectionLost(f"what answers does not speak AMQP 0.9.1; {_PORT}") from loss.__cause__
        raise


CHECK_BROKER: Final = "check ACESTEP_AMQP_URL, or run acestep-consumer doctor"
"""What to do where there is no connection."""


def describe(error: BaseException) -> str:
    """Return the error's text, without the number of an operating system's error; its type's name if it has no text."""
    match error.args:
        case (int(), str(text), *_):
            return text
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def _cancellations() -> int:
    """Return how many times this task was asked to stop."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _mapped(error: Exception) -> Exception:
    match error:
        case BrokerError():
            return error
        case amqp.PublishError():
            return Unroutable(str(error))
        case amqp.DeliveryError():
            return Nacked(str(error))
        case _ if isinstance(error, _LOSS):
            return _mapped_loss(error)
    # aiormq raises a bare Exception in whatever waits on a channel that was closed without a reason.
    return ConnectionLost("the channel was closed") if type(error) is Exception else error


def _mapped_loss(error: Exception) -> BrokerError:
    """Return ``BrokerRefused`` where a person has to act, else ``ConnectionLost``."""
    refusal = _refusal(error)
    return ConnectionLost(describe(error)) if refusal is None else BrokerRefused(refusal)


def _refusal(error: Exception) -> str | None:  # noqa: PLR0911 - a line per cause
    match error:
        case amqp.ProbableAuthenticationError() | amqp.AuthenticationError():
            return f"{str(error).rstrip('.')}: check the user and the password in ACESTEP_AMQP_URL; {ENCODING}"
        case amqp.InvalidFrameError() if _closed_instead_of_opened(error):
            return (
                "the broker does not open the virtual host: check that the one in ACESTEP_AMQP_URL exists, that the "
                "user may use it, and that its connection limit is not reached"
            )
        case amqp.InvalidFrameError():
            return None
        case amqp.ProtocolSyntaxError() | amqp.IncompatibleProtocolError():
            return f"{describe(error)}: ACESTEP_AMQP_URL does not lead to an AMQP 0.9.1 port"
        case ChannelAccessRefused():
            return f"{error}: give the user configure, write and read permission on acestep.*, and write on amq.default"
        case amqp.ChannelPreconditionFailed() if "inequivalent arg" in str(error):
            return (
                f"{error}: the object exists with other settings; set ACESTEP_QUEUE_TYPE and ACESTEP_QUEUE_MAXSIZE as "
                "it was declared, or drain it and delete it"
            )
        case amqp.AMQPError() if "rabbit_stream_queue" in str(error) and "feature flag is disabled" in str(error):
            return (
                "the broker's feature flag stream_queue is disabled, and cancellations are kept in a stream: run "
                "`rabbitmqctl enable_feature_flag stream_queue` (harmless; all nodes must run RabbitMQ 3.9 or later)"
            )
        case OSError(__cause__=ssl.SSLCertVerificationError()):
            return f"{error}: trust the broker's certificate (cafile=... in ACESTEP_AMQP_URL)"
        case _ if _is_unusable_file(error):
            return f"a file named in ACESTEP_AMQP_URL (cafile, certfile, keyfile) cannot be used: {describe(error)}"
    return None


def _is_unusable_file(error: Exception) -> bool:
    """Whether TLS could not be set up from its files. aiormq wraps errors of sockets, so these are none."""
    if isinstance(error, ssl.SSLError):
        return any(words in str(error) for words in ("[X509", "PEM lib"))
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError)


def _closed_instead_of_opened(error: Exception) -> bool:
    """Whether the broker closed the connection in place of opening it; aiormq does not pass on the broker's text."""
    return "Connection.OpenOk" in str(error) and "Connection.Close" in str(error)
