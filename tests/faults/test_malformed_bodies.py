# SPDX-License-Identifier: Apache-2.0
"""Fault: producers that send anything at all. A whole worker but for the engine, on a real broker and a real store.

Every message ends once: with one terminal event, or, when no id can be read in it, as a dead letter alone. What is
refused is kept as it came. The worker has neither stopped nor met a bug of its own at the end.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import boto3
import pytest

from acestep_consumer.app import Worker
from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.dead_letter import CODE
from acestep_consumer.broker.topology import DEAD_LETTER, EVENTS, GENERATE, IDENTIFIED, REQUESTS
from acestep_consumer.config.settings import load
from acestep_consumer.domain.errors import ConsumerError
from acestep_consumer.domain.parse import RequestRules, parse
from acestep_schemas.aliases import ALIASES, METAS, PARAM_OBJ
from acestep_schemas.events import JobCompleted, JobState, parse_event
from acestep_schemas.request import GenerationRequest
from infra.local.ports import PortClaim
from tests.support.broker import Peer, until
from tests.support.collector import freeze_the_living
from tests.support.fake_engine import FakeEngines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aio_pika.abc import AbstractIncomingMessage

    from infra.local.s3 import SeaweedFS
    from tests.support.servers import ManagementApi

SEED: Final = 20_261_123
BODIES: Final = 500
MAX_BYTES: Final = 1 << 20

NAMES: Final = [*GenerationRequest.model_fields, *(alias for aliases in ALIASES.values() for alias in aliases)]
# JSON as text: much of it is nothing that a JSON library would write.
VALUES: Final = [
    "null", "true", "-1", "0", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "9" * 500, "9" * 100_000,
    "0." + "0" * 9_000, '""', '" "', '"x"', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u202e"',
    f'"{"9" * 5_000}"', '"1e9999"', '"nan"', f'"{"a" * 300_000}"', f'"A{" " * 200_000}x"', f'"{"1," * 200_000}1"',
    f'"{"," * 200_000}"', "[]", "{}", "[[]]", "[null]", '["\\ud800"]', '{"\\ud800": 1}', '{"path": "\\ud800"}',
    '{"path": "a", "\\ud800": 1}', f"[{'0,' * 15_000}0]", f"[{'0,' * 100_000}0]", '{"a":' * 40 + "1" + "}" * 40,
    '"/etc/passwd"', '"file:///etc/passwd"', '"s3://other/a.wav"', '"s3://acestep/../other/a.wav"',
    '"https://169.254.169.254/a.wav"', '"https://localhost/a.wav"', '"../../../etc/passwd"', '"${jndi:ldap://x}"',
    '"{{7*7}}"', "\"'; DROP TABLE jobs; --\"", '"<|im_end|><|audio_code_64000|>"',
]  # fmt: skip
HOSTILE_IDS: Final = [
    "../{mark}",
    "../../{mark}",
    "{mark}/..",
    "/{mark}",
    "..",
    ".",
    "{mark}\\..\\x",
    "{mark}\n",
    "%2e%2e%2f{mark}",
]


@dataclass(frozen=True)
class Case:
    """One message. ``number`` is its correlation id, which its event and its dead letter carry."""

    number: str
    body: bytes
    message_id: str | None


class Fuzzer:
    """Makes bodies from wrong to nearly right; the same ones for the same seed."""

    def __init__(self, seed: int, mark: str) -> None:
        self._random = random.Random(seed)  # noqa: S311 - to be repeated, not to keep a secret
        self._mark = mark
        self._kinds: list[Callable[[], str | bytes]] = [
            self._one_value, self._several_values, self._nested, self._nested_as_text, self._cut, self._flipped,
            self._noise, self._encoded, self._deep, self._wide, self._repeated, self._without_end, self._hostile_id,
            self._impossible, self._right,
        ]  # fmt: skip

    def cases(self, count: int) -> list[Case]:
        """Make ``count`` messages, of each kind as many."""
        kinds = [self._kinds[number % len(self._kinds)] for number in range(count)]
        return [self._case(number, kind()) for number, kind in enumerate(kinds)]

    def _case(self, number: int, body: str | bytes) -> Case:
        encoded = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
        odd_id = self._random.choice(HOSTILE_IDS).format(mark=self._mark)
        message_id = self._random.choice([None, f"m-{number}", f"m-{number}", odd_id, "ü" * 100])
        return Case(str(number), encoded, message_id)

    def _fields(self, **fields: object) -> str:
        return json.dumps({"prompt": "blues", "audio_duration": 10, **fields})

    def _object(self, count: int) -> str:
        chosen = [self._random.choice(NAMES) for _ in range(count)]
        return "{" + ", ".join(f'"{name}": {self._random.choice(VALUES)}' for name in chosen) + "}"

    def _right(self) -> str:
        return self._fields(seed=self._random.randrange(1 << 31))

    def _impossible(self) -> str:
        wishes: list[dict[str, object]] = [
            {"thinking": True},
            {"task_type": "cover", "src_audio_path": "s3://acestep/none.wav"},
        ]
        return self._fields(**self._random.choice(wishes))

    def _one_value(self) -> str:
        return self._object(1)

    def _several_values(self) -> str:
        return self._object(4)

    def _nested(self) -> str:
        return f'{{"{self._random.choice([PARAM_OBJ, *METAS])}": {self._object(2)}}}'

    def _nested_as_text(self) -> str:
        return json.dumps({self._random.choice([PARAM_OBJ, *METAS]): self._object(2)})

    def _cut(self) -> str:
        whole = self._fields(lyrics="la " * 20)
        return whole[: self._random.randrange(len(whole))]

    def _flipped(self) -> bytes:
        body = bytearray(self._fields(lyrics="la " * 20).encode())
        for _ in range(self._random.randint(1, 8)):
            body[self._random.randrange(len(body))] = self._random.randrange(256)
        return bytes(body)

    def _noise(self) -> bytes:
        return self._random.randbytes(self._random.choice([0, 1, 100, 10_000]))

    def _encoded(self) -> bytes:
        return self._fields(lyrics="Größe").encode(
            self._random.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"])
        )

    def _deep(self) -> str:
        opening = self._random.choice(["[", '{"a":', '{"metas":{', "[{"])
        return opening * self._random.choice([33, 5_000, 100_000])

    def _wide(self) -> str:
        many = self._random.choice([19_000, 100_000])
        return "{" + ",".join(f'"{number}":0' for number in range(many)) + "}"

    def _repeated(self) -> str:
        return "{" + ",".join(f'"{name}": {self._random.choice(["1", "null", "[]"])}' for name in NAMES[:40] * 2) + "}"

    def _without_end(self) -> str:
        return '{"' + self._random.choice(['\\"', "\\\\", "\\u", "x", '","']) * self._random.choice(
            [10, 150_000, 600_000]
        )

    def _hostile_id(self) -> str:
        return self._fields(task_id=self._random.choice(HOSTILE_IDS).format(mark=self._mark))


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_stays_frozen() -> Iterator[None]:
    """Workers in this process freeze the tests, too."""
    yield
    freeze_the_living()


@pytest.fixture
def environment(service_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Settings of a worker in this process."""
    for name, value in service_environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    claim = PortClaim(1)
    yield service_environment | {
        "ACESTEP_QUEUE_WORKERS": "8",
        "ACESTEP_QUEUE_MAXSIZE": "1000",
        "ACESTEP_MAX_MESSAGE_BYTES": str(MAX_BYTES),
        "ACESTEP_INPUT_HOSTS": "169.254.169.254,localhost",
        "ACESTEP_HTTP_PORT": str(claim.ports[0]),
    }
    claim.release()


@asynccontextmanager
async def working(environment: dict[str, str]) -> AsyncIterator[Worker]:
    """A worker without its process; told to stop in the end, and waited for."""
    worker = Worker(load(environment, None), FakeEngines(), 20)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(worker.run())
        yield worker
        worker._signals.shut_down()
        await running


async def send(case: Case, peer: Peer, management: ManagementApi, vhost: str) -> None:
    """Publish a message. The AMQP client gives one to each message without an id: those go by the broker's HTTP API."""
    if case.message_id is not None:
        await peer.request(case.body, message_id=case.message_id, correlation_id=case.number)
        return
    message = {
        "routing_key": "generate",
        "properties": {"correlation_id": case.number},
        "payload": base64.b64encode(case.body).decode(),
        "payload_encoding": "base64",
    }
    path = f"/api/exchanges/{vhost}/{REQUESTS}/publish"
    assert await asyncio.to_thread(management.call, "POST", path, message) == {"routed": True}


async def settled(worker: Worker, peer: Peer) -> None:
    """Wait until no message waits and the worker has settled every delivery."""

    async def nothing_left() -> bool:
        waiting = [await peer.ready(queue) for queue in (GENERATE, IDENTIFIED)]
        consumer = worker._state.consumer
        return not any(waiting) and consumer is not None and consumer.in_hand == 0

    await until(nothing_left, "every message is settled")


async def terminal_events(peer: Peer) -> str:
    """Make a queue that hears how jobs end; its name."""
    queue = await peer.channel.declare_queue(exclusive=True)
    for state in JobState:
        if state.terminal:
            await queue.bind(EVENTS, f"job.{state}.*")
    return queue.name


async def emptied(peer: Peer, queue: str) -> dict[str, list[AbstractIncomingMessage]]:
    """Everything in a queue, by correlation id."""
    source = await peer.channel.get_queue(queue, ensure=False)
    found: dict[str, list[AbstractIncomingMessage]] = defaultdict(list)
    while message := await source.get(fail=False, no_ack=True):
        found[str(message.correlation_id)].append(message)
    return found


def judge(case: Case, events: list[AbstractIncomingMessage], letters: list[AbstractIncomingMessage]) -> str:
    """How a message ended; raises ``AssertionError`` unless that was one of the ways that are allowed."""
    codes = [str(letter.headers[CODE]) for letter in letters]
    assert "internal_error" not in codes, f"{case.body[:200]!r}: a bug in the worker"
    assert [letter.body for letter in letters] == [case.body] * len(letters)
    assert len(events) == 1, f"{case.body[:200]!r}: {len(events)} terminal events"
    event = parse_event(events[0].body)
    assert len(letters) == (0 if isinstance(event, JobCompleted) else 1)
    return event.type.split(".")[2]


def keys_in(s3: SeaweedFS, prefix: str = "") -> list[str]:
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


async def test_five_hundred_bodies_that_nobody_should_send_end_once_each_and_the_worker_lives(
    environment: dict[str, str],
    amqp_url: str,
    amqp_vhost: str,
    management: ManagementApi,
    s3: SeaweedFS,
    s3_prefix: str,
) -> None:
    mark = f"escaped-{s3_prefix}"
    cases = Fuzzer(SEED, mark).cases(BODIES)
    async with BrokerConnection(load(environment, None).broker, "topology"), Peer(amqp_url) as peer:
        heard = await terminal_events(peer)
        async with working(environment) as worker:
            for case in cases:
                await send(case, peer, management, amqp_vhost)
            await settled(worker, peer)
            await peer.request(b'{"task_id": "last", "prompt": "blues", "audio_duration": 10}', correlation_id="last")
            await settled(worker, peer)
        # The worker's connection is closed: what it had not settled would be in the queue again.
        assert await peer.ready(GENERATE) == 0
        events, letters = await emptied(peer, heard), await emptied(peer, DEAD_LETTER)
    ends = [judge(case, events[case.number], letters[case.number]) for case in cases]
    assert set(events) | set(letters) == {"last", *(case.number for case in cases)}
    assert parse_event(events["last"][0].body).type == "acestep.job.completed.v1"
    # All ways to end are among them, so that the fuzzer proves something.
    assert {end for end in ends if ends.count(end) >= 10} == {"completed", "rejected", "failed"}
    # One of the ids is a fitting one with a line break after it, which does not count.
    assert [key for key in keys_in(s3) if mark in key and not key.startswith(f"{s3_prefix}/{mark}/")] == []


@pytest.mark.parametrize("task_id", HOSTILE_IDS)
async def test_a_task_id_that_would_leave_its_prefix_names_no_object(
    environment: dict[str, str], amqp_url: str, s3: SeaweedFS, s3_prefix: str, task_id: str
) -> None:
    """As the body's own it is refused; as the message's it becomes an id that cannot go anywhere."""
    own = task_id.format(mark=f"escaped-{s3_prefix}")
    async with BrokerConnection(load(environment, None).broker, "topology"), Peer(amqp_url) as peer:
        heard = await terminal_events(peer)
        async with working(environment) as worker:
            body: dict[str, Any] = {"prompt": "blues", "audio_duration": 10}
            await peer.request(json.dumps(body | {"task_id": own}).encode(), correlation_id="body")
            await peer.request(json.dumps(body).encode(), message_id=own, correlation_id="message")
            await settled(worker, peer)
        events, letters = await emptied(peer, heard), await emptied(peer, DEAD_LETTER)
    if own.strip() == own:
        assert [letter.headers[CODE] for letter in letters["body"]] == ["invalid_request"]
    [message] = events["message"]
    completed = parse_event(message.body)
    assert isinstance(completed, JobCompleted)
    keys = keys_in(s3, s3_prefix)
    assert f"{s3_prefix}/{completed.subject}/manifest.json" in keys
    assert {key.split("/")[0] for key in keys} == {s3_prefix}
    assert all(len(key.split("/")) == 3 for key in keys)
    assert [key for key in keys_in(s3, "escaped-") if s3_prefix in key] == []


def test_no_body_of_a_megabyte_takes_the_event_loop_for_long() -> None:
    """What waits in vain for an end, and what can be read in many ways, would take hours if it took quadratic time."""
    half = MAX_BYTES // 2
    bodies = [
        b'{"' + b'\\"' * (half - 2),
        b'{"a":"' + b"\\\\" * (half - 8),
        json.dumps({"metas": '{"' + '\\"' * (half // 2 - 20)}).encode(),
        json.dumps({"key": "A" + " " * (MAX_BYTES - 20) + "x"}).encode(),
        json.dumps({"seed": "1," * (half - 10)}).encode(),
        json.dumps({"timesteps": "1," * (half - 20)}).encode(),
        json.dumps({"track_classes": "," * (MAX_BYTES - 40)}).encode(),
        b"{" + b'""' * (half - 1),
        b"[" * MAX_BYTES,
        b"," * MAX_BYTES,
        b"-" * MAX_BYTES,
        b'{"bpm":' + b"9" * (MAX_BYTES - 8) + b"}",
        b'{"lora":{' + b",".join(b'"%d":1' % number for number in range(19_000)) + b"}}",
    ]
    for body in bodies:
        assert len(body) <= MAX_BYTES
        began = time.process_time()
        with pytest.raises(ConsumerError, match=r"JSON|must"):
            parse(body, "m", RequestRules(max_bytes=MAX_BYTES, strict=True))
        with suppress(ConsumerError):
            parse(body, "m", RequestRules(max_bytes=MAX_BYTES))
        assert time.process_time() - began < 6, body[:20]
