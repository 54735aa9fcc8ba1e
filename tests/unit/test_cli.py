# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: ``--json`` everywhere, help, usage errors, completion, no colours off a terminal."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from typer.main import get_command

from acestep_consumer.cli import app
from acestep_consumer.domain.tasks import TASKS
from tests.support.command import run_command

pytestmark = pytest.mark.usefixtures("forked_processes")

# They work until they are stopped, or write files: there is no result to print.
WITHOUT_RESULT = {"run", "listen", "gateway", "tiny-checkpoint"}


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


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
@pytest.mark.parametrize("arguments", [["status", "--help"], ["run", "--help"], ["plan", "--card", "H100"]])
def test_tables_and_help_survive_an_output_that_is_not_utf_8(arguments: list[str], encoding: dict[str, str]) -> None:
    done = run_command(*arguments, variables=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_json_says_the_same_in_an_output_that_is_not_utf_8() -> None:
    card = ["plan", "--card", "café…𝄞", "--vram", "80", "--json"]
    plain, escaped = (run_command(*card, variables={"PYTHONIOENCODING": name}) for name in ("utf-8", "ascii"))
    assert escaped.stdout.isascii()
    assert json.loads(escaped.stdout) == json.loads(plain.stdout)
    assert json.loads(escaped.stdout)["card"]["name"] == "café…𝄞"


def test_no_option_is_explained_by_the_name_of_a_variable_alone() -> None:
    for name, command in leaves(get_command(app)):
        for option in command.params:
            said = getattr(option, "help", None) or ""
            assert not re.match(r"[A-Z]+_[A-Z_]+", said), f"{name} {option.name}: {said}"


def test_help_lists_the_settings_of_its_own_command() -> None:
    run, gateway = (run_command(name, "--help", variables={}).stdout for name in ("run", "gateway"))
    assert "ACESTEP_LM_BACKEND" in run
    assert "ACESTEP_API_ORIGINS" not in run
    assert "ACESTEP_API_ORIGINS" in gateway
    assert "ACESTEP_LM_BACKEND" not in gateway


@pytest.mark.parametrize(
    "arguments", [["status"], ["submit", "--prompt", "jazz"], ["watch"], ["topology", "--declare"]]
)
def test_without_a_broker_each_command_says_what_checks_it(arguments: list[str]) -> None:
    done = run_command(*arguments, variables={"ACESTEP_AMQP_URL": "amqp://127.0.0.1:1/"})
    assert done.returncode == 4
    assert "check ACESTEP_AMQP_URL, or run acestep-consumer doctor" in " ".join(done.stderr.split())


def test_the_version_can_be_asked_for() -> None:
    done = run_command("--version", variables={})
    assert (done.returncode, done.stdout) == (0, f"acestep-consumer {version('acestep-consumer')}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cancel", "a.b"], "'a.b' is not a task id: 1 to 128 letters, digits, - and _"),
        (["submit", "--task-id", "a b"], "'a b' is not a task id: 1 to 128 letters, digits, - and _"),
        (["watch", "a.b"], "'a.b' is not a task id: 1 to 128 letters, digits, - and _"),
        (["schema", "export"], "`export` needs a folder; the others take none"),
        (["dead", "requeue"], "give an id, or --all"),
        (["status", "--sampl", "1"], "No such option: --sampl"),
        (["statsu"], "No such command 'statsu'"),
        (["run", "--grace", "-1"], "Invalid value for '--grace'"),
        (["run", "--grace", "nan"], "Invalid value for '--grace'"),
        (["doctor", "--timeout", "nan"], "Invalid value for '--timeout'"),
        (["submit", "--prompt", "x", "--guidance", "nan"], "--guidance nan: must be a finite number"),
        (["submit", "--prompt", "x", "--format", "midi"], "--format midi: must be 'mp3'"),
        (["submit", "--prompt", "x", "--lora-scale", "1"], "--lora-scale needs --lora"),
        (["submit", "--lyrics", "x", "--lyrics-file", "-"], "--lyrics and --lyrics-file exclude each other"),
        (["submit", "-", "--lyrics-file", "-"], "only one of request and lyrics can come from standard input"),
        (["plan", "--card", "Frobozz 9000"], "the memory of Frobozz 9000 is unknown: add --vram GB"),
        (["schema", "export", "/dev/null"], "cannot write to /dev/null: File exists"),
        (["submit", "--prompt", "x", "--download", __file__], "Invalid value for '--download'"),
        (["tiny-checkpoint", "/proc/x"], "cannot write to /proc/x"),
    ],
    ids=" ".join,
)
def test_every_wrong_use_is_an_error_of_the_same_form_and_ends_with_2(arguments: list[str], said: str) -> None:
    done = run_command(*arguments, variables={"COLUMNS": "40"})
    assert (done.returncode, done.stdout) == (2, "")
    error, *hint = done.stderr.splitlines()
    assert error.startswith(f"error: {said}")
    assert all(line.startswith("Try 'acestep-consumer ") for line in hint)


def test_the_help_of_submit_names_every_task_type() -> None:
    submit = next(command for name, command in leaves(get_command(app)) if name == "submit")
    text = next(option.help for option in submit.params if option.name == "task_type")
    assert set(re.findall(r"[\w-]+", text)) - {"or"} == set(TASKS)


@pytest.mark.parametrize("command", [name for name, _ in leaves(get_command(app))] + ["", "dead"])
def test_help_begins_with_a_short_summary_and_has_no_types_or_ranges(command: str) -> None:
    done = run_command(*command.split(), "--help", variables={"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    if command:
        assert done.stdout.splitlines()[3].rstrip().endswith("."), "one line of 80 columns"
    assert not re.search(r"<(bool|str|int|float|path)|<=|range\]", done.stdout)
