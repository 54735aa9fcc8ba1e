# SPDX-License-Identifier: Apache-2.0
"""The commands: `python -m infra.local up | down | env | exec -- COMMAND... | demo | rabbitmq4`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from infra.local import demo, rabbitmq4, state
from infra.local.packages import ensure_rabbitmq
from infra.local.process import ServerError
from infra.local.signals import held, stop_cleanly_on_signals
from infra.local.stack import Stack, say

_CHILD_GRACE_S = 15


def main() -> int:
    """Run one command; returns 0, 1 after an error, or the exit status of the child."""
    arguments = _parser().parse_args()
    stop_cleanly_on_signals()
    try:
        return _run(arguments)
    except ServerError as error:
        say(f"error: {error}")
        return 1


def _run(arguments: argparse.Namespace) -> int:
    match arguments.verb:
        case "up" | "env":
            print(state.up().exports())
            hint = 'set the variables with: eval "$(bash infra/dev up)"; ' if sys.stdout.isatty() else ""
            say(f"The servers run; {hint}stop them with: bash infra/dev down")
            return 0
        case "down":
            say("Stopped the local servers." if state.down() else "No local servers are running.")
            return 0
        case "rabbitmq4":
            os.environ[rabbitmq4.VARIABLE] = "4"
            ensure_rabbitmq()
            rabbitmq4.try_out()
            return 0
        case "exec":
            return _exec(arguments.command[arguments.command[:1] == ["--"] :])
        case _:
            return demo.main(rest=arguments.rest)


def _exec(command: list[str]) -> int:
    """Run a command with its own servers, which are stopped afterwards."""
    if not command:
        raise ServerError("exec needs a command: python -m infra.local exec -- COMMAND [ARGUMENT...]")
    with ExitStack() as running:
        folder = running.enter_context(tempfile.TemporaryDirectory(prefix="acestep-", ignore_cleanup_errors=True))
        environment = running.enter_context(Stack(Path(folder)))
        return _foreground(command, os.environ | environment.variables())


def _foreground(command: list[str], variables: dict[str, str]) -> int:
    child: subprocess.Popen[bytes] | None = None
    try:
        with held():
            child = subprocess.Popen(command, env=variables)
        status = child.wait()
    except OSError as error:
        raise ServerError(f"could not start {command[0]}: {error.strerror}") from error
    except SystemExit:
        if child is not None:
            _end(child)
        raise
    return status if status >= 0 else 128 - status


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_CHILD_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.local", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="start a broker and an S3 server in the background; print the variables to export")
    verbs.add_parser("env", help="same as up")
    verbs.add_parser("down", help="stop the servers of up, and delete their data")
    shown = verbs.add_parser("demo", help="run one request from end to end")
    shown.add_argument("--rest", action="store_true", help="over ACE-Step's REST API, with curl")
    verbs.add_parser("rabbitmq4", help="make the root file system with RabbitMQ 4 and try it, unless it is there")
    run = verbs.add_parser("exec", help="run a command with its own broker and S3 server")
    run.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND [ARGUMENT...]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
