# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer dead`` on a real broker: look, give another chance, remove; nothing is lost on the way."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest
from pamqp.commands import Basic

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.dead_letter_queue import DeadLetter, DeadLetterQueue
from acestep_consumer.broker.publisher import Publisher
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from acestep_consumer.commands.dead.view import DeadLetterRow
from acestep_consumer.domain.errors import ConsumerError, MalformedBody, RenderFailed
from tests.support.broker import Peer, broker_settings, until
from tests.support.command import run_command
from tests.support.waiting import WITHIN_S
from tests.support.worker import COMMAND, ROOT, clean_environment

LONG_AGO = "2020-01-01T00:00:00+00:00"


@dataclass
class DeadCommand:
    """Runs ``dead`` as a person does."""

    url: str
    queue_type: str = "classic"

    async def __call__(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        variables = {"ACESTEP_AMQP_URL": self.url, "ACESTEP_QUEUE_TYPE": self.queue_type, "COLUMNS": "200"}
        return await asyncio.to_thread(run_command, "dead", *arguments, variables=variables, text=text)

    async def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """What ``list --json`` prints."""
        done = await self("list", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    async def ids(self, *arguments: str) -> list[str]:
        return [row["task_id"] for row in await self.rows(*arguments)]


@pytest.fixture
def dead(amqp_url: str) -> DeadCommand:
    return DeadCommand(amqp_url)


async def bury(
    url: str, *task_ids: str, error: ConsumerError | None = None, headers: dict[str, Any] | None = None, **values: Any
) -> None:
    """Let a worker give up a request of each id, in this order."""
    async with BrokerConnection(broker_settings(url, **values), "worker") as link:
        for task_id in task_ids:
            properties = Basic.Properties(
                message_id=task_id, headers=headers, correlation_id="c1", priority=7, content_type="application/json"
            )
            await Publisher(link, "w1").dead_letter(body(task_id), properties, error or RenderFailed("no sound"))


def body(task_id: str) -> bytes:
    return json.dumps({"prompt": "jazz", "task_id": task_id}).encode()


async def ready(url: str, queue: str) -> int:
    async with Peer(url) as peer:
        return await peer.ready(queue)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_look_tells_why_and_leaves_every_letter_in_its_place(amqp_url: str, queue_type: str) -> None:
    dead = DeadCommand(amqp_url, queue_type)
    wanted = [f"t{number}" for number in range(6)]
    await bury(amqp_url, *wanted, queue_type=queue_type)
    for _ in range(2):
        rows = await dead.rows()
        assert [row["task_id"] for row in rows] == wanted
    assert {(row["code"], row["reason"], row["worker"]) for row in rows} == {("render_failed", "no sound", "w1")}
    assert rows[0]["bytes"] == len(body("t0"))
    assert rows[0]["at"] > LONG_AGO
    assert await dead.ids("--limit", "2") == wanted[:2]
    assert await dead.ids() == wanted
    assert await ready(amqp_url, DEAD_LETTER) == 6


async def test_the_table_shows_id_code_and_reason_and_says_how_many_there_are(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "t1", "t2", error=MalformedBody("it \x1b[31mbites"))
    done = await dead("list", "--limit", "1")
    assert done.returncode == 0
    assert all(text in done.stdout for text in ("t1", "malformed_body", "bites"))
    assert "t2" not in done.stdout
    assert "\x1b" not in done.stdout
    assert "1 dead letter shown, 2 in the queue; --limit shows more" in done.stderr


async def test_a_letter_is_one_line_where_the_output_goes_to_a_program(amqp_url: str, dead: DeadCommand) -> None:
    """As wide as a narrow terminal it would be folded into eight, and ``grep`` would find neither id nor reason."""
    task_id, reason = "9b30df5d-6d89-4065-a054-3c38bfaf2175", "a reason with as many words as reasons have " * 3
    await bury(amqp_url, task_id, error=MalformedBody(reason))
    done = await asyncio.to_thread(run_command, "dead", "list", variables={"ACESTEP_AMQP_URL": amqp_url})
    (line,) = (line for line in done.stdout.splitlines() if task_id in line)
    assert reason.strip() in line


async def test_what_expired_in_the_queue_is_listed_as_that(amqp_url: str, dead: DeadCommand) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "worker"), Peer(amqp_url) as producer:
        await producer.request(body("late"), message_id="late", expiration=0.01)

        async def expired() -> bool:
            return await producer.ready(DEAD_LETTER) == 1

        await until(expired, "the dead letter")
    (row,) = await dead.rows("--since", "1h")
    assert (row["task_id"], row["code"]) == ("late", "expired")
    assert GENERATE in row["reason"]


async def test_filters_leave_what_fits_all_of_them(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "broken", error=MalformedBody("no"))
    await bury(amqp_url, "silent")
    assert await dead.ids("--code", "render_failed") == ["silent"]
    assert await dead.ids("--since", LONG_AGO) == ["broken", "silent"]
    assert await dead.ids("--since", "2100-01-01") == []


async def test_a_letter_is_shown_in_full_without_its_secrets(amqp_url: str, dead: DeadCommand) -> None:
    headers = {"authorization": "Bearer sesame", "origin": "https://me:sesame@host/x", "traceparent": "00-ab"}
    await bury(amqp_url, "t1", "t2", headers=headers)
    done = await dead("show", "t2")
    assert done.returncode == 0, done.stderr
    assert "sesame" not in done.stdout
    letter = json.loads(done.stdout)
    assert (letter["task_id"], letter["code"]) == ("t2", "render_failed")
    assert (letter["headers"]["traceparent"], letter["headers"]["authorization"]) == ("00-ab", "***")
    assert letter["properties"]["priority"] == 7
    assert letter["body"] == {"prompt": "jazz", "task_id": "t2"}
    assert await ready(amqp_url, DEAD_LETTER) == 2


async def test_a_requeued_letter_is_the_request_as_it_came(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "t1", "t2", headers={"traceparent": "00-ab", "x-delivery-count": 2})
    done = await dead("requeue", "t1")
    assert (done.returncode, done.stdout) == (0, "t1\n")
    async with Peer(amqp_url) as worker:
        request = await worker.take(GENERATE)
    assert (request.body, request.message_id) == (body("t1"), "t1")
    assert (request.correlation_id, request.priority, request.content_type) == ("c1", 7, "application/json")
    assert (request.headers, request.redelivered) == ({"traceparent": "00-ab"}, False)
    assert await dead.ids() == ["t2"]


async def test_what_the_broker_gave_up_comes_back_without_the_brokers_notes_and_does_not_expire_again(
    amqp_url: str, dead: DeadCommand
) -> None:
    async with BrokerConnection(broker_settings(amqp_url), "worker"), Peer(amqp_url) as peer:
        await peer.request(body("late"), message_id="late", expiration=0.01, headers={"mine": "1"})
        await peer.look(DEAD_LETTER)
    assert (await dead("requeue", "--all")).returncode == 0
    async with Peer(amqp_url) as worker:
        request = await worker.take(GENERATE)
    assert (request.message_id, request.headers, request.expiration) == ("late", {"mine": "1"}, None)


async def test_a_full_queue_ends_a_requeue_with_3_and_the_others_stay(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "t1", "t2", "t3", "t4", queue_maxsize=2)
    done = await dead("requeue", "--all")
    assert (done.returncode, done.stdout) == (3, "t1\nt2\n")
    assert "the queue is full: 2 dead letters requeued, the others stay" in done.stderr
    assert await dead.ids() == ["t3", "t4"]
    assert await ready(amqp_url, GENERATE) == 2


async def test_who_dies_between_the_confirm_and_the_ack_leaves_a_copy_and_loses_nothing(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    async def die(_self: DeadLetterQueue, _letter: DeadLetter) -> None:
        raise Killed

    await bury(amqp_url, "t1", "t2")
    monkeypatch.setattr(DeadLetterQueue, "remove", die)
    with pytest.raises(Killed):
        async with DeadLetterQueue(broker_settings(amqp_url)) as queue:
            await queue.requeue(await anext(queue.messages()))
    async with DeadLetterQueue(broker_settings(amqp_url)) as queue:
        assert [DeadLetterRow.of(letter).task_id async for letter in queue.messages()] == ["t1", "t2"]
    async with Peer(amqp_url) as worker:
        assert (await worker.take(GENERATE)).message_id == "t1"


async def test_letters_that_come_during_a_requeue_wait_for_the_next_one(amqp_url: str) -> None:
    """Else a request that fails at once would be requeued for ever."""
    await bury(amqp_url, "t1", "t2")
    seen = []
    async with DeadLetterQueue(broker_settings(amqp_url)) as queue:
        async for letter in queue.messages():
            await queue.requeue(letter)
            seen.append(letter.message_id)
            await bury(amqp_url, str(letter.message_id))
    assert seen == ["t1", "t2"]
    assert await ready(amqp_url, DEAD_LETTER) == 2


async def test_a_purge_asks_first_and_says_how_many(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "t1", "t2")
    for answer in ("n\n", ""):
        refused = await dead("purge", "--all", text=answer)
        assert refused.returncode == 2
        assert "Remove 2 dead letters for good?" in refused.stderr
        assert await dead.ids() == ["t1", "t2"]
    assert (await dead("purge", "t1", text="y\n")).returncode == 0
    assert await dead.ids() == ["t2"]


async def test_ctrl_c_at_the_question_of_a_purge_removes_nothing_and_ends_with_130(
    amqp_url: str, dead: DeadCommand
) -> None:
    await bury(amqp_url, "t1")
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "dead", "purge", "--all", env=clean_environment({"ACESTEP_AMQP_URL": amqp_url}), cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(WITHIN_S):
        assert b"Remove 1 dead letter for good?" in await process.stderr.readuntil(b"[y/N]: ")
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert await dead.ids() == ["t1"]


async def test_a_purge_without_question_removes_only_what_fits(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "broken", error=MalformedBody("no"))
    await bury(amqp_url, "silent")
    done = await dead("purge", "--all", "--code", "malformed_body", "--yes")
    assert (done.returncode, "1 dead letter removed" in done.stderr) == (0, True)
    assert await dead.ids() == ["silent"]
    assert "no dead letter matches" in (await dead("purge", "--all", "--code", "expired", "--yes")).stderr


async def test_what_was_done_with_is_a_line_of_json_each_as_the_list_prints_it(
    amqp_url: str, dead: DeadCommand
) -> None:
    await bury(amqp_url, "t1", "t2", "t3", "t4")
    first, *others = await dead.rows()
    requeued = await dead("requeue", "t1", "--json")
    assert (requeued.returncode, [json.loads(line) for line in requeued.stdout.splitlines()]) == (0, [first])
    purged = await dead("purge", "--all", "--yes", "--json")
    assert (purged.returncode, [json.loads(line) for line in purged.stdout.splitlines()]) == (0, others)
    assert await ready(amqp_url, GENERATE) == 1
    nothing = await dead("purge", "--all", "--yes", "--json")
    assert (nothing.returncode, nothing.stdout) == (0, "")


async def test_json_leaves_the_exit_codes_and_the_question_as_they_are(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "t1", "t2", "t3", queue_maxsize=1)
    full = await dead("requeue", "--all", "--json")
    assert (full.returncode, [json.loads(line)["task_id"] for line in full.stdout.splitlines()]) == (3, ["t1"])
    for arguments in (("requeue", "nobody"), ("purge", "nobody", "--yes"), ("show", "nobody")):
        done = await dead(*arguments, "--json")
        assert (done.returncode, done.stdout) == (2, "")
    asked = await dead("purge", "--all", "--json", text="n\n")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert await dead.ids() == ["t2", "t3"]


async def test_a_letter_in_full_is_one_line_when_that_is_asked_for(amqp_url: str, dead: DeadCommand) -> None:
    await bury(amqp_url, "t1")
    shown, one_line = await dead("show", "t1"), await dead("show", "t1", "--json")
    (line,) = one_line.stdout.splitlines()
    assert (one_line.returncode, json.loads(line)) == (0, json.loads(shown.stdout))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("requeue",), "--all"),
        (("purge", "t1", "--all"), "--all"),
        (("requeue", "nobody"), "dead list"),
        (("show", "nobody"), "dead list"),
        (("list", "--code", "tired"), "render_failed"),
        (("list", "--since", "yesterday"), "90s"),
    ],
)
async def test_a_mistake_ends_with_2_and_says_what_to_do(
    amqp_url: str, dead: DeadCommand, arguments: tuple[str, ...], said: str
) -> None:
    await bury(amqp_url, "t1")
    done = await dead(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert await dead.ids() == ["t1"]


async def test_a_broker_without_our_queues_or_out_of_reach_ends_with_4(dead: DeadCommand) -> None:
    done = await dead("list")
    assert done.returncode == 4
    assert "topology --declare" in " ".join(done.stderr.split())
    away = await DeadCommand("amqp://user:sesame@127.0.0.1:1/")("requeue", "--all")
    assert away.returncode == 4
    assert "ACESTEP_AMQP_URL" in away.stderr
    assert "sesame" not in away.stderr
