# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with the broker, in four words of our own; the client library's exceptions are mapped here only.

::

    BrokerFault
    ├── LinkLost        connection or channel gone, or no answer in time: try again on the next one
    ├── Nacked          the broker refused to store the message, for now
    ├── Unroutable      no queue takes the message
    └── BrokerRefused   password, virtual host, permission, other arguments: a person has to act
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aio_pika import exceptions as amqp
from aiormq.exceptions import ChannelAccessRefused
from pamqp.exceptions import PAMQPException

if TYPE_CHECKING:
    from collections.abc import Iterator


class BrokerError(Exception):
    """Base of all."""


class ConnectionLost(BrokerError):
    """The connection or the channel went away, or the broker did not answer in time."""


class Nacked(BrokerError):
    """The broker refused the message on its publisher confirm: a queue is full, or could not store it."""


class Unroutable(BrokerError):
    """No queue takes the message, or its address cannot be written as AMQP."""


class BrokerRefused(BrokerError):
    """The broker refuses what we ask, and will go on doing so; the text says what to change."""


# RuntimeError: aiormq's ChannelInvalidStateError, and what asyncio makes of a StopAsyncIteration at a stream's end.
_LOSS = (amqp.AMQPError, PAMQPException, OSError, RuntimeError)


@contextmanager
def mapped() -> Iterator[None]:
    """Turn every exception of the client library into one of ours; a real cancellation passes."""
    try:
        yield
    except asyncio.CancelledError as error:
        # aiormq cancels what waits on a channel that it closes. Nobody asked this task to stop: a loss, then.
        if _is_cancelled():
            raise
        raise ConnectionLost("the channel was closed") from error
    except BrokerError:
        raise
    except amqp.PublishError as error:
        raise Unroutable(str(error)) from error
    except amqp.DeliveryError as error:
        raise Nacked(str(error)) from error
    except _LOSS as error:
        raise _judge(error) from error
    except Exception as error:
        # aiormq ends what still waits on a channel closed without a reason with a bare Exception.
        if type(error) is not Exception:
            raise
        raise ConnectionLost("the channel was closed") from error


def describe(error: BaseException) -> str:
    """Return the error's text; of an operating system's error without its number, and the kind where there is none."""
    match error.args:
        case (int(), str(text), *_):
            return text
    return str(error) or type(error).__name__


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _judge(error: Exception) -> BrokerError:
    """Tell a refusal, which needs a person, from a loss, which needs patience."""
    refusal = _refusal(error)
    return ConnectionLost(describe(error)) if refusal is None else BrokerRefused(refusal)


def _refusal(error: Exception) -> str | None:  # noqa: PLR0911 - a line per cause
    match error:
        case amqp.ProbableAuthenticationError() | amqp.AuthenticationError():
            return f"{str(error).rstrip('.')}: check the user and the password in ACESTEP_AMQP_URL"
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
    return None


def _closed_instead_of_opened(error: Exception) -> bool:
    """The client library keeps the broker's answer to itself when it is not the one that it expected."""
    return "Connection.OpenOk" in str(error) and "Connection.Close" in str(error)
