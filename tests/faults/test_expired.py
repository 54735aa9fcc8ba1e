# SPDX-License-Identifier: Apache-2.0
"""Requests that waited too long: one ``expired`` event, whether the worker finds out or the broker."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from acestep_consumer.broker.topology import DEAD_LETTER, NOTICES
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running


async def test_a_deadline_in_the_body_counts_from_the_messages_timestamp(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    url = service_environment["ACESTEP_AMQP_URL"]
    body = b'{"task_id": "late", "prompt": "x", "queue_deadline_s": 5}'
    async with (
        running(WorkerProcess(tmp_path, service_environment, light=True)),
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.request(body, message_id="late", timestamp=datetime.now(UTC) - timedelta(seconds=60))
        await eventually(lambda: recorder.terminal("late"), WITHIN_S)
        assert recorder.states("late") == ["expired"]
        assert recorder.terminal("late")[0].data["error"]["code"] == "expired"
        assert (await peer.take(DEAD_LETTER)).message_id == "late"


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_message_that_the_broker_expires_is_told_once_and_kept_among_the_dead_letters(
    kind: str, service_environment: dict[str, str], tmp_path: Path
) -> None:
    settings = service_environment | {"ACESTEP_QUEUE_TYPE": kind}
    url, go = settings["ACESTEP_AMQP_URL"], tmp_path / "go"
    body = b'{"task_id": "late", "prompt": "x"}'
    async with (
        running(WorkerProcess(tmp_path, settings, light=True)),
        EventRecorder(url) as recorder,
        Peer(url) as peer,
    ):
        await peer.submit(task_id="first", prompt=f"until={go}")
        await eventually(lambda: "started" in recorder.states("first"), WITHIN_S)
        await peer.request(body, message_id="late", expiration=0.2, correlation_id="c-1")
        await eventually(lambda: recorder.terminal("late"), WITHIN_S)
        assert recorder.states("late") == ["expired"]
        assert (await peer.take(DEAD_LETTER)).message_id == "late"
        go.touch()
        await eventually(lambda: recorder.terminal("first"), WITHIN_S)

    async with Peer(url) as peer:

        async def none_left() -> bool:
            return await peer.ready(NOTICES) == 0

        await until(none_left, "no notices left")
        assert len(recorder.terminal("late")) == 1
