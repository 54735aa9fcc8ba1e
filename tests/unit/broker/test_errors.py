# SPDX-License-Identifier: Apache-2.0
"""The client library's exceptions end in the broker package: each is mapped, and publishing raises none of them."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import aio_pika.exceptions
import aiormq.exceptions
import pamqp.exceptions
import pytest
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from acestep_consumer.broker import publisher as publisher_module
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.errors import (
    BrokerError,
    BrokerRefused,
    ConnectionLost,
    Nacked,
    Unroutable,
    describe,
    mapped,
)
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.domain.errors import Unpublished
from acestep_consumer.domain.ports import Reply
from tests.support.broker import failed_event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiormq.channel import Channel


def library_exceptions() -> Iterator[type[BaseException]]:
    for module in (aiormq.exceptions, aio_pika.exceptions, pamqp.exceptions):
        for name in vars(module):
            found = getattr(module, name)
            if isinstance(found, type) and issubclass(found, BaseException):
                yield found


RETURN = Basic.Return(312, "NO_ROUTE", "x", "k")
# What else comes out of it: the operating system's errors, a cancellation nobody asked for, a bare Exception.
OTHERS = [TimeoutError(), ConnectionResetError(104, "reset"), OSError("gone"), asyncio.CancelledError(), Exception()]


def instance(kind: type[BaseException]) -> BaseException:
    if kind is aio_pika.exceptions.PublishError:
        returned = DeliveredMessage(RETURN, ContentHeader(), b"", cast("Any", None))
        return aio_pika.exceptions.PublishError(returned, RETURN)
    if kind is aio_pika.exceptions.DeliveryError:
        return aio_pika.exceptions.DeliveryError(None, Basic.Nack(1))
    return kind("one", "two") if issubclass(kind, pamqp.exceptions.PAMQPException) else kind()


ALL = [instance(kind) for kind in sorted(set(library_exceptions()), key=lambda kind: kind.__name__)] + OTHERS


class OneBadTry:
    """A channel whose first publish raises, and whose later ones are confirmed."""

    is_closed = False

    def __init__(self, error: BaseException, *, always: bool = False) -> None:
        self.error, self.always, self.tries = error, always, 0

    async def basic_publish(self, body: bytes, **_: object) -> None:
        self.tries += 1
        if self.always or self.tries == 1:
            raise self.error


class FakeConnection:
    def __init__(self, channel: OneBadTry) -> None:
        self._channel = channel
        self.refusals: list[float | None] = []

    async def channel(self) -> Channel:
        return cast("Channel", self._channel)

    def publish_refused(self, at_most_every_s: float | None = None) -> None:
        """A refusal may make a real one reconnect."""
        self.refusals.append(at_most_every_s)

    async def redeclare(self) -> None:
        raise ConnectionLost("not now")


def publisher_on(channel: OneBadTry) -> Publisher:
    return Publisher(cast("BrokerConnection", FakeConnection(channel)), "w1")


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
async def test_every_exception_of_aio_pika_and_aiormq_becomes_a_broker_error(error: BaseException) -> None:
    with pytest.raises(BrokerError) as fault, mapped():
        raise error
    assert fault.value.__cause__ is error


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
async def test_publishing_tries_again_after_any_of_them(error: BaseException) -> None:
    channel = OneBadTry(error)
    await publisher_on(channel).publish(failed_event("t1"), Reply())
    assert channel.tries == 2


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
async def test_publishing_raises_only_unpublished_in_the_end(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "PATIENCE_S", 0.06)
    with pytest.raises(Unpublished):
        await publisher_on(OneBadTry(error, always=True)).publish(failed_event("t1"), Reply())


@pytest.mark.parametrize(
    ("error", "noted"),
    [(instance(aio_pika.exceptions.DeliveryError), [None]), (instance(aio_pika.exceptions.PublishError), [])],
    ids=["nacked", "returned"],
)
async def test_only_a_refused_publish_is_a_reason_for_another_channel(error: BaseException, noted: list[None]) -> None:
    connection = FakeConnection(OneBadTry(error))
    await Publisher(cast("BrokerConnection", connection), "w1").publish(failed_event("t1"), Reply())
    assert connection.refusals == noted


async def test_a_bug_is_not_taken_for_an_error_of_the_broker() -> None:
    with pytest.raises(ZeroDivisionError), mapped():
        raise ZeroDivisionError


async def test_a_real_cancellation_passes() -> None:
    async def wait() -> None:
        with mapped():
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("error", [None, RuntimeError("closed"), Exception()])
async def test_a_cancellation_that_the_library_loses_ends_the_task_all_the_same(error: Exception | None) -> None:
    entered = asyncio.Event()

    async def lose() -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if error is not None:
                raise error from None

    async def poll() -> None:
        while True:
            with suppress(BrokerError), mapped():
                await lose()

    task = asyncio.create_task(poll())
    await entered.wait()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_a_task_that_is_being_cancelled_can_still_close_its_channel() -> None:
    closed = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with mapped():
                await asyncio.sleep(0)
            closed.append("channel")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert closed == ["channel"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (instance(aio_pika.exceptions.PublishError), Unroutable),
        (instance(aio_pika.exceptions.DeliveryError), Nacked),
        (aiormq.exceptions.ChannelInvalidStateError(), ConnectionLost),
        (aiormq.exceptions.ConnectionInternalError("541"), ConnectionLost),
        (
            aiormq.exceptions.ConnectionInternalError(
                "Cannot declare a queue of type 'rabbit_stream_queue': the corresponding feature flag is disabled"
            ),
            BrokerRefused,
        ),
        (aiormq.exceptions.ChannelNotFoundEntity("no exchange"), ConnectionLost),
        (aiormq.exceptions.ChannelPreconditionFailed("unknown delivery tag 1"), ConnectionLost),
        (aiormq.exceptions.ChannelPreconditionFailed("inequivalent arg 'x-max-length'"), BrokerRefused),
        (aiormq.exceptions.ProbableAuthenticationError("ACCESS_REFUSED"), BrokerRefused),
        (aiormq.exceptions.ChannelAccessRefused("ACCESS_REFUSED"), BrokerRefused),
        (aiormq.exceptions.InvalidFrameError("bad frame"), ConnectionLost),
        (aiormq.exceptions.ProtocolSyntaxError("AMQP1"), BrokerRefused),
    ],
)
async def test_a_loss_and_a_refusal_are_told_apart(error: Exception, kind: type[BrokerError]) -> None:
    with pytest.raises(BrokerError) as fault, mapped():
        raise error
    assert type(fault.value) is kind


async def test_a_certificate_that_is_not_trusted_is_a_refusal() -> None:
    error = aiormq.exceptions.AMQPConnectionError(1, "certificate verify failed")
    error.__cause__ = ssl.SSLCertVerificationError()
    with pytest.raises(BrokerRefused, match="trust the broker's certificate"), mapped():
        raise error


def test_an_error_is_described_by_its_text_or_at_least_its_type() -> None:
    assert describe(OSError(111, "Connect call failed")) == "Connect call failed"
    assert describe(aiormq.exceptions.ChannelInvalidStateError()) == "ChannelInvalidStateError"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory"),
        PermissionError(13, "Permission denied"),
        ssl.SSLError(136, "[X509: NO_CERTIFICATE_OR_CRL_FOUND] no certificate or crl found"),
        ssl.SSLError(524297, "[SSL] PEM lib (_ssl.c:3905)"),
    ],
)
async def test_a_file_for_tls_that_cannot_be_used_is_for_a_person_to_correct(error: OSError) -> None:
    with pytest.raises(BrokerRefused, match=r"ACESTEP_AMQP_URL \(cafile, certfile, keyfile\) cannot be used"), mapped():
        raise error


@pytest.mark.parametrize("error", [ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"), ssl.SSLZeroReturnError()])
async def test_a_handshake_that_fails_may_pass(error: OSError) -> None:
    with pytest.raises(ConnectionLost), mapped():
        raise error
