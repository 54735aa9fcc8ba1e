# SPDX-License-Identifier: Apache-2.0
"""The exit codes are documented where people look: in ``--help`` and in the documentation."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from acestep_consumer.client import ClientError, InvalidTaskId, QueueFull, Unreachable
from acestep_consumer.commands.base import print_client_error
from acestep_consumer.config.exit_codes import MEANINGS, Exit, listed
from tests.support.command import run_command

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "infra/docs/operations.md"
README = ROOT / "README.md"


def help_of(*arguments: str) -> str:
    done = run_command(*arguments, "--help", variables={"COLUMNS": "400", "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_every_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Exit)
    assert len(set(MEANINGS.values())) == len(Exit)


def test_the_help_lists_every_code() -> None:
    text = help_of()
    for code, meaning in MEANINGS.items():
        assert f"{code:d} {meaning}".replace("`", "") in text


def test_the_documentation_lists_the_same_codes() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {f"{code:d}": meaning for code, meaning in MEANINGS.items()}


def test_the_readme_names_every_code_in_order() -> None:
    readme = " ".join(README.read_text(encoding="utf-8").split())
    _, _, line = readme.partition("[Exit codes](infra/docs/operations.md#command-line): ")
    assert re.findall(r"(?:^|, )(\d+) ", line.partition(". ")[0]) == [f"{code:d}" for code in MEANINGS]


def test_the_line_begins_with_success() -> None:
    assert listed().startswith("Exit codes: 0 done · 1 ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidTaskId("a b"), Exit.USAGE),
        (QueueFull(3.0), Exit.QUEUE_FULL),
        (Unreachable("no connection to the broker: check [ACESTEP_AMQP_URL] " + "and so on " * 20), Exit.UNREACHABLE),
    ],
)
def test_a_client_error_is_one_line_however_narrow_the_output_and_has_its_code(error: ClientError, code: Exit) -> None:
    said = StringIO()
    assert print_client_error(error, Console(file=said, width=40)) is code
    assert said.getvalue() == f"error: {error}\n"


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in help_of()
