# SPDX-License-Identifier: Apache-2.0
"""A real RabbitMQ cluster on loopback: brokers that know each other, each to be killed, stopped and brought back."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from infra.local import rabbitmq4
from infra.local.process import ServerError
from infra.local.rabbitmq import RabbitMQ
from tests.support.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SIZE = 3
FORMED_WITHIN_S = WITHIN_S
_POLL_S = 0.2

# It has another name in RabbitMQ 3.10.
_RUNNING_NODES = """\
case erlang:function_exported(rabbit_nodes, list_running, 0) of
    true -> rabbit_nodes:list_running();
    false -> rabbit_nodes:all_running()
end"""

_CONFIGURATION = """\
# Nodes that cannot see most of the others stop working rather than go on apart.
cluster_partition_handling = pause_minority
"""

# Only the first one starts by itself. Three that find each other at the same time take ten seconds more.
_JOINING = """\
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.classic_config.nodes.1 = {first}
cluster_formation.classic_config.nodes.2 = {own}
cluster_formation.discovery_retry_interval = 250
cluster_formation.discovery_retry_limit = 200
"""


class Node(RabbitMQ):
    """One broker of a cluster. The first one's port mapper and cookie are everybody's."""

    def __init__(self, folder: Path, first: Node | None = None) -> None:
        super().__init__(folder)
        self._first = first
        if first is not None:
            self._epmd_port = first._epmd_port

    @property
    def name(self) -> str:
        """What the cluster calls it, such as ``acestep-24813@localhost``."""
        return self._node

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self._broker is not None and self._broker.running()

    def evaluate(self, expression: str) -> str:
        """Return what an Erlang expression is at this node: in milliseconds, where rabbitmqctl takes seconds."""
        done = subprocess.run(
            self._wrapped(["erl_call", "-n", self.name, "-e"]),
            input=f"{expression}.\n",
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        answer = re.fullmatch(r"\{ok, (.*)\}", done.stdout, re.DOTALL)
        if answer is None:
            raise ServerError(f"{self.name} could not evaluate {expression}: {done.stdout} {done.stderr}")
        return answer[1]

    def sees(self) -> set[str]:
        """Return the names of the nodes that run in its cluster, as it knows them."""
        return set(re.findall(r"[\w-]+@\w+", self.evaluate(_RUNNING_NODES)))

    def stop(self) -> None:
        """Stop the broker in good order. The port mapper stays: the others need it."""
        if self._broker is not None:
            self._broker.end()
            self._broker = None

    def close(self) -> None:
        """End it for good; the first one only after all others."""
        super().close()
        super().stop()

    def prepare(self) -> None:
        """Make what the other nodes need of the first one: the cookie and the port mapper."""
        self._write_files()
        self._start_port_mapper()

    def _start_port_mapper(self) -> None:
        if self._first is None:
            super()._start_port_mapper()

    def _write_files(self) -> None:
        cookie = self.folder / ".erlang.cookie"
        if self._first is not None and not cookie.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._first.folder / ".erlang.cookie", cookie)
        super()._write_files()
        with (self.folder / "rabbitmq.conf").open("a") as configuration:
            configuration.write(_CONFIGURATION)
            if self._first is not None:
                configuration.write(_JOINING.format(first=self._first.name, own=self.name))


class Cluster:
    """Nodes that form a cluster as a context manager is entered."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        first = Node(folder / "node-0")
        self.nodes = [first, *(Node(folder / f"node-{number}", first) for number in range(1, size))]

    @property
    def amqp_url(self) -> str:
        """The default virtual host at every node, as ``ACESTEP_AMQP_URL`` takes it."""
        return self.vhost_url("/")

    def vhost_url(self, vhost: str, nodes: Sequence[Node] = ()) -> str:
        """Return the comma-separated URLs of a virtual host: at these nodes, or at all."""
        return ",".join(node.vhost_url(vhost) for node in nodes or self.nodes)

    def add_vhost(self, vhost: str) -> None:
        """Make a virtual host that guest may use."""
        every = '<<".*">>'
        permission = f'<<"guest">>, <<"{vhost}">>, {every}, {every}, {every}, <<"test">>'
        assert self.nodes[0].evaluate(f'rabbit_vhost:add(<<"{vhost}">>, <<"test">>)') == "ok"
        assert self.nodes[0].evaluate(f"rabbit_auth_backend_internal:set_permissions({permission})") == "ok"

    def leader(self, queue: str, asked: Node, vhost: str = "/") -> Node:
        """Return the node that leads a quorum queue, or is the home of a classic one, as ``asked`` knows it."""
        found = f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>))'
        leader = asked.evaluate(f"{found}, proplists:get_value(leader, rabbit_amqqueue:info(Queue, [leader]))")
        return next(node for node in self.nodes if node.name == leader.strip("'"))

    def __enter__(self) -> Self:
        try:
            self.nodes[0].prepare()
            if rabbitmq4.wanted():
                # There, each joins the one that runs the longest, and one that finds itself to be that joins none.
                self.nodes[0].start()
            with ThreadPoolExecutor(len(self.nodes)) as threads:
                list(threads.map(Node.start, [node for node in self.nodes if not node.running]))
            self.wait_for(self.nodes)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all nodes at once, those too that are down."""
        for node in reversed(self.nodes):
            node.close()

    def mend(self) -> None:
        """Bring back the nodes that are down."""
        if down := [node for node in self.nodes if not node.running]:
            with ThreadPoolExecutor(len(down)) as threads:
                list(threads.map(Node.start, down))
            self.wait_for(self.nodes)

    def wait_for(self, nodes: Sequence[Node]) -> None:
        """Return when the first of these sees exactly these running.

        Raises:
            ServerError: it does not within a minute; with what it sees.
        """
        wanted, deadline = {node.name for node in nodes}, time.monotonic() + FORMED_WITHIN_S
        while (seen := nodes[0].sees()) != wanted:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"no cluster of {sorted(wanted)} within {FORMED_WITHIN_S:g} s: {nodes[0].name} sees {sorted(seen)}"
                )
            time.sleep(_POLL_S)
