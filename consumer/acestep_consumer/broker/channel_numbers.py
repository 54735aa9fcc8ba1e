# SPDX-License-Identifier: Apache-2.0
"""An AMQP connection that numbers its channels itself: the number of a closed channel is not used again soon.

The broker closes a channel over a refusal, and the client confirms that. aiormq regards the number as free before the
confirmation is sent: a channel that somebody else opens at that moment gets the same number, its opening overtakes the
confirmation, and the broker closes the connection over a "second 'channel.open'". With ten frames waiting to be sent
aiormq even drops the confirmation, and the broker never frees the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika.connection import Connection
from yarl import URL

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel, AbstractConnection

# RabbitMQ's default for the highest number.
_HIGHEST = 2047


class NumberedConnection(Connection):
    """aio-pika's connection; each new channel gets the next free number, and 1 again after the highest."""

    _last_number = 0

    def channel(  # the library's signature, hence the flags by position
        self,
        channel_number: int | None = None,
        publisher_confirms: bool = True,  # noqa: FBT001, FBT002
        on_return_raises: bool = False,  # noqa: FBT001, FBT002
    ) -> AbstractChannel:
        """Make a channel, which opens when it is awaited or entered. Raises ``RuntimeError`` when not connected."""
        number = self._next_number() if channel_number is None else channel_number
        return super().channel(number, publisher_confirms, on_return_raises)

    def _next_number(self) -> int | None:
        """Return a free number; None, which leaves it to aiormq, when not connected or when all are taken."""
        if self.transport is None:
            return None
        opened = self.transport.connection
        highest = opened.connection_tune.channel_max or _HIGHEST
        candidates = ((self._last_number + step) % highest + 1 for step in range(highest))
        number = next((number for number in candidates if number not in opened.channels), None)
        self._last_number = number or self._last_number
        return number


async def connect(url: URL | str, name: str, timeout_s: float) -> AbstractConnection:
    """Return an open connection of this name, with the exceptions of aio-pika and aiormq.

    One that cannot be opened is closed: else its destructor does it, when there may be no event loop any more.
    """
    connection = NumberedConnection(URL(url), client_properties={"connection_name": name})
    try:
        await connection.connect(timeout=timeout_s)
    except BaseException:
        await connection.close()
        raise
    return connection


def version_of(connection: AbstractConnection) -> str | None:
    """Return RabbitMQ's version, such as ``3.10.8``; None where the broker does not report it."""
    transport = connection.transport
    version = transport.connection.server_properties.get("version") if transport else None
    return version if isinstance(version, str) else None
