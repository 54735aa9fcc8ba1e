# SPDX-License-Identifier: Apache-2.0
"""Fault: a request as large as RabbitMQ 4 takes at all. It is refused with its event, and kept as it came."""

import hashlib
from pathlib import Path

import aio_pika
import pytest

from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, REQUESTS
from tests.support.broker import Peer, until
from tests.support.event_recorder import EventRecorder
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

# RabbitMQ 4's default for max_message_size; RabbitMQ 3 takes 128 MiB.
LARGEST_BYTES = 16 << 20


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_the_largest_message_is_rejected_and_kept_whole_and_the_next_one_is_done(
    service_environment: dict[str, str], tmp_path: Path, kind: str
) -> None:
    settings = service_environment | {"ACESTEP_QUEUE_TYPE": kind}
    url = settings["ACESTEP_AMQP_URL"]
    body = b'{"prompt": "' + b"x" * (LARGEST_BYTES - 14) + b'"}'
    assert len(body) == LARGEST_BYTES
    async with running(WorkerProcess(tmp_path, settings, light=True)), EventRecorder(url) as seen, Peer(url) as peer:
        message = aio_pika.Message(body, delivery_mode=2, message_id="song")
        exchange = await peer.channel.get_exchange(REQUESTS, ensure=False)
        await exchange.publish(message, "generate", timeout=60)
        await eventually(lambda: [heard for heard in seen.events if heard.terminal], WITHIN_S)
        (end,) = (heard for heard in seen.events if heard.terminal)
        assert (end.state, end.data["error"]["code"]) == ("rejected", "message_too_large")
        assert end.task_id == "song"
        kept = await peer.take(DEAD_LETTER, WITHIN_S)
        assert hashlib.sha256(kept.body).digest() == hashlib.sha256(body).digest()
        await peer.submit(task_id="next")
        await eventually(lambda: "completed" in seen.states("next"), WITHIN_S)
        await until(lambda: _is_empty(peer), "the queue is empty")


async def _is_empty(peer: Peer) -> bool:
    return await peer.ready(GENERATE) == 0
