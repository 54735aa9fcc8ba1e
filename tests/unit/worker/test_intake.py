# SPDX-License-Identifier: Apache-2.0
"""A drain that breaks: it is said, and so is the end of the worker."""

import asyncio
from typing import cast
from unittest.mock import AsyncMock, Mock

import pytest

from acestep_consumer.broker.consumer import Consumer
from acestep_consumer.broker.identified_queue import IdentifiedQueue
from acestep_consumer.engine.device_usage import DeviceUsage
from acestep_consumer.worker.announcements import Announcements
from acestep_consumer.worker.intake import Intake


async def test_an_error_of_the_drain_is_raised_once_the_workers_end_is_announced() -> None:
    foreseen_by_nobody = KeyError("nobody foresaw this")
    consumer = Mock(in_hand=1, stop_consuming=AsyncMock(), finish=AsyncMock(side_effect=foreseen_by_nobody))
    announcements = Mock(leaving=AsyncMock())
    intake = Intake(
        cast("Consumer", consumer),
        DeviceUsage(),
        cast("Announcements", announcements),
        cast("IdentifiedQueue", Mock(stop=AsyncMock())),
    )
    with pytest.raises(KeyError, match="nobody foresaw this"):
        await intake.drain(1, asyncio.Event())
    assert [call.args[0] for call in announcements.leaving.await_args_list] == ["draining", "stopped"]
