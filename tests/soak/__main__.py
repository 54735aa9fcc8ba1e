# SPDX-License-Identifier: Apache-2.0
"""The command: load and faults for so many minutes, then everything whole again, everything done, and the audit."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from infra.local.process import ServerError
from infra.local.signals import stop_cleanly_on_signals
from infra.local.state import LOCAL
from tests.soak.audit import Evidence, Finding, audit, names_of
from tests.soak.faults import FaultInjector
from tests.soak.load import Producer, Sort, shares
from tests.soak.plan import plan
from tests.soak.report import as_lines, as_table, figures, keep
from tests.soak.servers import SoakServers
from tests.support.event_recorder import EventRecorder
from tests.support.object_store import ObjectStore
from tests.support.worker import ROOT

REPORT_EVERY_S = 5.0
# Between faults, on average. An engine with a model takes 6 s to start, and several times that on a busy machine.
PAUSE_S = {"light": 3.5, "tiny": 12.0}
# No job has ended for so long: those that are open will not end.
STUCK_S = 180.0
# However many jobs end: a worker that does the same ones again and again is found, too.
DONE_WITHIN_S = 1800.0
# With nothing in the queue and no job running for so long, an event that has not come will not come.
IDLE_S = 15.0
_POLL_S = 0.5
_CHECKS_AT_ONCE = 8

_console = Console(stderr=True, highlight=False, soft_wrap=True)


class Soak:
    """One run. ``run`` returns what the audit found."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._began = time.monotonic()
        commit = arguments.instead or arguments.beside
        other = _source_tree(commit, folder / "code") if commit else ROOT
        code = [other if arguments.instead else ROOT, other]
        light = arguments.engine == "light"
        self._pause_s = arguments.pause or PAUSE_S[arguments.engine]
        self._soak_servers = SoakServers(folder, quorum=arguments.quorum, engine=arguments.engine, code=code)
        url = self._soak_servers.environment["ACESTEP_AMQP_URL"]
        self._recorder = EventRecorder(url)
        self._object_store = ObjectStore.of(self._soak_servers.environment, "bytes" if light else "seconds")
        kinds = shares(light=light, first_release=arguments.first_release)
        self._producer = Producer(
            url,
            random.Random(arguments.seed + 1),  # noqa: S311 - a load that can be repeated, no secret
            arguments.rate,
            kinds,
            recorder=self._recorder,
            object_store=self._object_store,
            fronts=[slot.front for slot in self._soak_servers.slots],
            wires={slot.worker_id: slot.amqp for slot in self._soak_servers.slots},
        )
        self._injector = FaultInjector(self._soak_servers, lambda text: self._tell(f"! {text}"))

    async def run(self) -> list[Finding]:
        """Everything, from the first server to the last figure."""
        self._tell("starting a broker, an S3 server and two workers ...")
        async with self._soak_servers, self._recorder, self._producer:
            telling = asyncio.create_task(self._tell_how_it_goes())
            await self._break_things_under_load()
            evidence = await self._settle()
            telling.cancel()
        return self._judge(evidence)

    async def _break_things_under_load(self) -> None:
        length_s = 60 * self._arguments.minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(self._producer.run(length_s))
            group.create_task(self._injector.carry_out(plan(self._arguments.seed, length_s, self._pause_s)))
        for slot in self._soak_servers.slots:
            slot.heal()
            slot.wake()

    async def _settle(self) -> Evidence:
        """Wait until all is done, let the workers leave, and look at what there is."""
        self._tell("no more faults, no more requests: waiting until everything is done ...")
        unacked = await self._wait_until_done()
        self._tell("the workers leave ...")
        for slot in self._soak_servers.slots:
            await slot.leave()
        return await self._look(unacked)

    async def _wait_until_done(self) -> int:
        """Return how many messages are unacked when nothing moves any more."""
        began = moved_at = idle_since = time.monotonic()
        ended = 0
        while (now := time.monotonic()) < min(moved_at + STUCK_S, began + DONE_WITHIN_S):
            if (count := len({event.task_id for event in self._recorder.events if event.terminal})) > ended:
                ended, moved_at = count, now
            depth = await self._soak_servers.depth()
            if depth.ready or depth.unacked:
                idle_since = time.monotonic()  # on a busy machine, to ask takes longer than the idle time
            elif not self._open or now > idle_since + IDLE_S:
                break
            await asyncio.sleep(_POLL_S)
        return (await self._soak_servers.depth()).unacked

    async def _look(self, unacked: int) -> Evidence:
        self._tell("looking at queue, bucket and scratch folders ...")
        submissions, dead = self._producer.submissions, await self._soak_servers.dead_letters()
        names = names_of(self._recorder.events, dead)
        events = [replace(event, task_id=names.get(event.task_id, event.task_id)) for event in self._recorder.events]
        return Evidence(
            submissions=submissions,
            events=events,
            wrongs=await self._wrongs(Evidence(submissions=submissions, events=events)),
            dead=[names.get(task_id, task_id) for task_id, _ in dead],
            ready=(await self._soak_servers.depth()).ready,
            unacked=unacked,
            leftovers=self._soak_servers.leftovers(),
            exits=sum(
                (slot.exits for slot in self._soak_servers.slots), start=type(self._soak_servers.slots[0].exits)()
            ),
        )

    async def _wrongs(self, evidence: Evidence) -> dict[str, list[str]]:
        """Compare every completed job with the bucket; the last time it was announced, if songs were made again."""
        free = asyncio.Semaphore(_CHECKS_AT_ONCE)

        async def check(task_id: str) -> tuple[str, list[str]]:
            async with free:
                done = next(end for end in reversed(evidence.ends[task_id]) if end.state == "completed")
                return task_id, await self._object_store.wrongs(done.data)

        completed = [task_id for task_id, outcome in evidence.outcomes.items() if outcome == "completed"]
        checked = await asyncio.gather(*map(check, completed))
        return {task_id: wrongs for task_id, wrongs in checked if wrongs}

    def _judge(self, evidence: Evidence) -> list[Finding]:
        findings = audit(evidence)
        done = {str(kind): count for kind, count in self._injector.done.items()}
        numbers = figures(evidence, done, self._recorder.lost)
        keep(self._folder, evidence, numbers, findings)
        _console.print(as_table(f"Soak of {self._arguments.minutes:g} minutes, seed {self._arguments.seed}", numbers))
        return findings

    @property
    def _open(self) -> int:
        """Accepted requests without a terminal event; those without an id count as long as they are in the queue."""
        ended = {event.task_id for event in self._recorder.events if event.terminal}
        ended |= {each.task_id for each in self._producer.submissions.values() if each.sort is Sort.WITHOUT_ID}
        return sum(each.confirmed > 0 and each.task_id not in ended for each in self._producer.submissions.values())

    async def _tell_how_it_goes(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            workers = ", ".join(f"{slot.name} {'up' if slot.up else 'down'}" for slot in self._soak_servers.slots)
            broken = "; ".join(map(str, self._injector.now)) or "nothing"
            sent = len(self._producer.submissions)
            self._tell(f"{sent} requests, {self._open} open; {workers}; broken: {broken}")

    def _tell(self, text: str) -> None:
        _console.print(f"{time.monotonic() - self._began:6.1f} s  {text}", markup=False)


def main() -> int:
    """Run the soak: 0 when every promise was kept, 1 when one was not."""
    arguments = _parser().parse_args()
    stop_cleanly_on_signals()
    folder = LOCAL / f"soak-{arguments.seed}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    # The client library tells of every lost connection; here they are lost on purpose.
    logging.basicConfig(filename=folder / "clients.log", level=logging.WARNING)
    _console.print(f"logs and evidence: {folder}", markup=False)
    try:
        findings = asyncio.run(Soak(arguments, folder).run())
    except ServerError as error:
        _console.print(f"error: {error}", markup=False)
        return 1
    if not findings:
        for data in (folder / "s3" / "data", folder / "rabbitmq" / "data"):
            shutil.rmtree(data, ignore_errors=True)  # hundreds of megabytes that nobody needs now
    for line in as_lines(findings):
        _console.print(f"NOT KEPT: {line}", markup=False)
    _console.print(f"{'every promise was kept' if not findings else 'the audit failed'}; {folder}", markup=False)
    return 1 if findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash infra/dev soak",
        description="Two whole workers (their models alone are missing) under load while processes, broker, network "
        "and storage break, then an audit: every accepted request ended once, with its songs in the bucket.",
    )
    parser.add_argument("--minutes", type=float, default=2, help="of load and faults (2); settling comes on top")
    parser.add_argument("--seed", type=int, default=1, help="decides the faults and the load (1)")
    parser.add_argument("--rate", type=float, default=4, help="requests a second (4)")
    parser.add_argument(
        "--pause", type=float, metavar="SECONDS", help="between faults, on average (3.5; 12 with --engine tiny)"
    )
    parser.add_argument("--quorum", action="store_true", help="quorum queues in place of classic ones")
    parser.add_argument(
        "--engine", choices=("light", "tiny"), default="light",
        help="tiny: the real engine processes with a model of random weights; wants --rate 1 or less",
    )  # fmt: skip
    older = parser.add_mutually_exclusive_group()
    older.add_argument("--beside", metavar="COMMIT", help="the second worker runs the code of this commit")
    older.add_argument("--instead", metavar="COMMIT", help="both do, to see what the audit finds of it")
    parser.add_argument(
        "--first-release", action="store_true", help="send only what 0.1.0 handled: no message without an id, for one"
    )
    return parser


def _source_tree(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder. Raises ``ServerError`` if there is no such commit."""
    folder.mkdir()
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        raise ServerError(f"--beside {commit}: {packed.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
