# SPDX-License-Identifier: Apache-2.0
"""Nodes of a RabbitMQ cluster die and leave under load: what was accepted ends once, and workers go to other nodes."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Self

import pytest

from acestep_consumer.broker.connection import BrokerConnection
from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE
from acestep_consumer.client import Client, NoQueue, QueueFull, Unreachable
from infra.local.packages import ensure_rabbitmq
from infra.local.s3 import REGION, SeaweedFS
from infra.local.stack import Environment
from tests.support.broker import Peer, broker_settings
from tests.support.cluster import Cluster
from tests.support.event_recorder import EventRecorder
from tests.support.object_store import ObjectStore
from tests.support.waiting import WITHIN_S, eventually
from tests.support.worker import WorkerProcess, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.cluster import Node

LIMIT = 30
# Each channel learns a little late that a quorum queue is full: two that publish one after the other overshoot by two.
OVERSHOOT = 2
# What a careful producer waits when it was refused: a queue without a leader refuses as a full one does.
AGAIN_S = 0.2
# RabbitMQ 3.10 may never confirm what was on its way to a stream while that lost its leader.
PATIENCE_S = 5.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes (about 20 seconds)."""
    ensure_rabbitmq()
    with Cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def environment(cluster: Cluster, s3: SeaweedFS, s3_prefix: str) -> dict[str, str]:
    """The variables of a worker on the cluster, all of whose nodes run."""
    cluster.mend()
    servers = Environment(
        amqp_url=cluster.amqp_url,
        s3_endpoint=s3.endpoint,
        s3_bucket=s3.bucket,
        access_key=s3.access_key,
        secret_key=s3.secret_key,
        region=REGION,
    )
    return servers.variables() | {
        "ACESTEP_S3_PREFIX": s3_prefix,
        "ACESTEP_QUEUE_TYPE": "quorum",
        "ACESTEP_QUEUE_MAXSIZE": str(LIMIT),
        "ACESTEP_QUEUE_WORKERS": "2",
    }


class Scenario:
    """Workers that begin at different nodes, and a producer and a subscriber that know all nodes."""

    def __init__(self, cluster: Cluster, environment: dict[str, str], folder: Path, vhost: str = "/") -> None:
        self._cluster = cluster
        self._environment = environment
        self._folder = folder
        self._vhost = vhost
        self._stack = AsyncExitStack()
        # From the last node on, so that its queue is led there: what is measured is the fate of the request queue.
        self.recorder = EventRecorder(cluster.vhost_url(vhost, cluster.nodes[::-1]), "quorum")
        self.client = Client(cluster.vhost_url(vhost), patience_s=PATIENCE_S)
        self.accepted: list[str] = []

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def listen(self) -> None:
        """Let producer and subscriber begin: when the exchanges are there."""
        await self._stack.enter_async_context(self.recorder)
        await self._stack.enter_async_context(self.client)

    async def worker(self, name: str, begins_at: int) -> WorkerProcess:
        """Start a worker whose first node is this one."""
        nodes = self._cluster.nodes[begins_at:] + self._cluster.nodes[:begins_at]
        variables = {"ACESTEP_WORKER_ID": name, "ACESTEP_AMQP_URL": self._cluster.vhost_url(self._vhost, nodes)}
        (self._folder / name).mkdir()
        worker = WorkerProcess(self._folder / name, self._environment | variables, light=True)
        return await self._stack.enter_async_context(running(worker))

    async def submit(self, *task_ids: str, prompt: str = "takes=0.4") -> None:
        """Have requests accepted, the one after the other, each tried until it is."""
        for task_id in task_ids:
            deadline = time.monotonic() + WITHIN_S
            while not await self.accepts(task_id, prompt):
                assert time.monotonic() < deadline, f"{task_id} was refused for {WITHIN_S:g} s"
                await asyncio.sleep(AGAIN_S)

    async def accepts(self, task_id: str, prompt: str = "x") -> bool:
        """Send one request once."""
        request = {"task_id": task_id, "prompt": prompt, "audio_format": "wav", "audio_duration": 10}
        try:
            self.accepted.append(await self.client.submit(request))
        except (QueueFull, Unreachable):
            return False
        return True

    async def cancel(self, task_id: str) -> None:
        """Have a cancellation confirmed; sending it again is safe."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                with suppress(Unreachable):
                    return await self.client.cancel(task_id)

    async def ended(self, count: int | None = None) -> None:
        """Wait until so many of the accepted requests have ended; None: all."""
        wanted = len(self.accepted) if count is None else count
        await eventually(
            lambda: sum(bool(self.recorder.terminal(task_id)) for task_id in self.accepted) >= wanted, WITHIN_S
        )

    def starts(self, worker_id: str, after: float) -> list[float]:
        """When this worker began jobs, after that time."""
        began = (event for event in self.recorder.events if event.state == "started" and event.at > after)
        return [event.at for event in began if event.data["worker_id"] == worker_id]

    async def audit(self, *cancelled: str) -> None:
        """Each accepted request has one end, however often it was told, and its songs are there."""
        object_store = ObjectStore.of(self._environment)
        for task_id in self.accepted:
            told = self.recorder.terminal(task_id)
            assert len({event.cloud_event["id"] for event in told}) == 1, task_id
            assert len({event.body for event in told}) == 1, task_id
            assert told[0].state == ("cancelled" if task_id in cancelled else "completed"), told[0].cloud_event
            if task_id not in cancelled:
                assert await object_store.wrongs(told[0].data) == []
        assert {event.task_id for event in self.recorder.events} == set(self.accepted)


def consumes_at(worker: WorkerProcess, node: Node) -> bool:
    """Whether this is the node that the worker consumes at, or did last, as its log tells."""
    consuming = [line for line in worker.log_lines(event="broker connected") if line["connection"].endswith(" consume")]
    return f":{node.port}/" in consuming[-1]["broker"]


def misses_home(worker: WorkerProcess) -> bool:
    """Whether this worker's log says why it cannot work."""
    waits = worker.log_lines(event="broker not reachable, trying again")
    # The words of RabbitMQ 3 and 4.
    said = ("home node", "process is stopped by supervisor")
    return any(words in line["reason"] for line in waits for words in said)


async def test_what_was_accepted_ends_once_whichever_node_dies_or_leaves(
    cluster: Cluster,
    environment: dict[str, str],
    tmp_path: Path,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    async with Scenario(cluster, environment, tmp_path) as scenario:
        # The first one declares the queues: they are led by its node.
        workers = [await scenario.worker("w0", 0)]
        workers += await asyncio.gather(scenario.worker("w1", 1), scenario.worker("w2", 2))
        await scenario.listen()
        await scenario.cancel("unwanted")

        dying = cluster.nodes[0]
        assert await asyncio.to_thread(cluster.leader, GENERATE, dying) is dying
        await scenario.submit(*(f"first-{number}" for number in range(24)))
        await scenario.ended(6)
        dying.kill()
        killed_at = time.monotonic()
        leaderless = asyncio.create_task(scenario.submit(*(f"leaderless-{number}" for number in range(12))))
        await eventually(lambda: not consumes_at(workers[0], dying), WITHIN_S)
        consuming_at = time.monotonic()
        record_testsuite_property("seconds until a worker whose node died consumes again", consuming_at - killed_at)
        await leaderless
        record_testsuite_property("seconds until twelve more requests are accepted", time.monotonic() - killed_at)
        await asyncio.to_thread(dying.start)
        await scenario.ended()

        leaving = await asyncio.to_thread(cluster.leader, GENERATE, dying)
        await scenario.submit(*(f"second-{number}" for number in range(12)))
        await eventually(lambda: scenario.starts("w0", consuming_at), WITHIN_S)
        await asyncio.to_thread(leaving.stop)
        await scenario.submit("endless", prompt=f"until={tmp_path / 'never'}")
        await eventually(lambda: "started" in scenario.recorder.states("endless"), WITHIN_S)
        await scenario.cancel("endless")
        await scenario.ended()

        await asyncio.gather(*(asyncio.to_thread(worker.process.end, WITHIN_S) for worker in workers))
        async with Peer(dying.amqp_url) as peer:
            await peer.submit(task_id="unwanted")  # without a timestamp: its cancellation of long ago counts
            scenario.accepted.append("unwanted")
            taken = 1 + sum([await scenario.accepts(f"waiting-{number}") for number in range(LIMIT + 4)])
            assert LIMIT <= taken <= LIMIT + OVERSHOOT
            assert await peer.ready(GENERATE) == taken
        # A worker that starts finds the nodes that are there.
        await asyncio.gather(asyncio.to_thread(leaving.start), scenario.worker("late", cluster.nodes.index(leaving)))
        await scenario.ended()
        await scenario.audit("endless", "unwanted")
        async with Peer(leaving.amqp_url) as peer:
            assert (await peer.ready(GENERATE), await peer.ready(DEAD_LETTER)) == (0, 0)


async def test_a_classic_queue_is_away_with_its_node_and_the_worker_waits_for_it(
    cluster: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    vhost, go = "classic", tmp_path / "go"
    home, elsewhere, _ = cluster.nodes
    await asyncio.to_thread(cluster.add_vhost, vhost)
    environment = environment | {"ACESTEP_QUEUE_TYPE": "classic"}
    async with BrokerConnection(broker_settings(home.vhost_url(vhost), queue_maxsize=LIMIT), "declares"):
        pass
    async with Scenario(cluster, environment, tmp_path, vhost) as scenario:
        worker = await scenario.worker("w", cluster.nodes.index(elsewhere))
        await scenario.listen()
        await scenario.submit("running-0", "running-1", prompt=f"until={go}")
        await eventually(lambda: all(scenario.recorder.states(task_id) for task_id in scenario.accepted), WITHIN_S)
        await scenario.submit("waiting-0", "waiting-1")

        await asyncio.to_thread(home.stop)
        await eventually(lambda: misses_home(worker), WITHIN_S)
        assert (worker.get("/healthz")[0], worker.get("/readyz")[0]) == (200, 503)
        # RabbitMQ 3 says that no queue takes it, and RabbitMQ 4 refuses it.
        with pytest.raises((NoQueue, QueueFull)):
            await scenario.client.submit({"task_id": "too-late", "prompt": "x"})
        go.touch()

        await asyncio.to_thread(home.start)
        await scenario.ended()
        await scenario.audit()
