# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: ``--json`` everywhere, completion, no colours where nobody sees them."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from acestep_consumer.cli import app
from tests.support.command import run_command

# They work until they are stopped, or write files: there is no result to print.
WITHOUT_RESULT = {"run", "listen", "tiny-checkpoint"}


def leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All commands that do something, by their names as they are typed."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for each, sub in command.commands.items():
        yield from leaves(sub, f"{name} {each}".strip())


def test_every_command_with_a_result_prints_it_as_json_when_asked_to() -> None:
    flags = {
        name: {flag: option.help for option in command.params for flag in option.opts if flag == "--json"}
        for name, command in leaves(get_command(app))
    }
    assert {name for name, json in flags.items() if not json} == WITHOUT_RESULT
    assert all("JSON" in about for json in flags.values() for about in json.values())


def test_completion_for_bash_knows_commands_and_flags() -> None:
    script = run_command("--show-completion", "bash", variables={})
    assert script.returncode == 0, script.stderr
    assert "_ACESTEP_CONSUMER_COMPLETE=complete_bash" in script.stdout
    asked = {"_ACESTEP_CONSUMER_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for typed, completed in (("dead re", "requeue"), ("submit --js", "--json")):
        done = run_command(variables={**asked, "COMP_WORDS": f"acestep-consumer {typed}"})
        assert done.stdout.split() == [completed]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["submit"], 2)])
def test_what_no_terminal_sees_has_no_colours(arguments: list[str], code: int) -> None:
    done = run_command(*arguments, variables={})
    assert done.returncode == code
    assert "\x1b" not in done.stdout + done.stderr
