# SPDX-License-Identifier: Apache-2.0
"""Starts servers in the background (`up`) and stops them (`down`); what was started is in `.local/stack.json`."""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local.compose import ComposeServers
from infra.local.process import ProcessId
from infra.local.stack import Environment, Stack, say

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / ".local"


@dataclass(frozen=True)
class Running:
    """Servers that `up` started: their addresses, and what to stop."""

    variables: dict[str, str]
    folder: Path
    processes: tuple[ProcessId, ...]
    leftovers: tuple[Path, ...]
    compose_project: str | None

    def alive(self) -> bool:
        """Whether all native servers run; a Compose project is assumed to."""
        return all(process.alive() for process in self.processes)

    def end(self) -> None:
        """Stop the servers, by pid and start time or by project name, and delete their data."""
        if self.compose_project is not None:
            ComposeServers(self.compose_project).close()
        for process in self.processes:
            process.end(grace_s=5)
        for path in self.leftovers:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def up(local: Path = LOCAL) -> Environment:
    """Start servers in the background, or return the environment of those that run.

    Raises:
        ServerError: a server could not be started.
    """
    with _locked(local):
        running = _read(local)
        if running is not None and running.alive():
            say("The local servers are already running.")
            return Environment.from_variables(running.variables)
        if running is not None:
            say("The local servers are not running any more: starting new ones.")
            running.end()
        return _start(local)


def down(local: Path = LOCAL) -> bool:
    """Stop what `up` started; False: nothing was running."""
    with _locked(local):
        running = _read(local)
        if running is None:
            return False
        running.end()
        (local / "stack.json").unlink()
        return True


def _start(local: Path) -> Environment:
    folder = local / f"up-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    stack = Stack(folder, guarded=False)
    environment = stack.start()
    try:
        _write(local, Running(
            environment.variables(), folder, tuple(stack.processes), tuple(stack.leftovers), stack.compose_project
        ))  # fmt: skip
    except BaseException:
        stack.close()
        raise
    return environment


def _write(local: Path, running: Running) -> None:
    # It contains keys, though only of temporary servers: readable by the owner only.
    path = local / "stack.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(running), default=str, indent=2))


def _read(local: Path) -> Running | None:
    path = local / "stack.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    return Running(
        variables=saved["variables"],
        folder=Path(saved["folder"]),
        processes=tuple(ProcessId(**process) for process in saved["processes"]),
        leftovers=tuple(Path(left) for left in saved["leftovers"]),
        compose_project=saved["compose_project"],
    )


@contextmanager
def _locked(local: Path) -> Iterator[None]:
    """Serialise concurrent calls, so that the second sees what the first started."""
    local.mkdir(parents=True, exist_ok=True)
    with (local / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
