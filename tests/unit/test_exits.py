# SPDX-License-Identifier: Apache-2.0
"""The exit codes are documented where people look: in ``--help`` and in the README."""

import re
from pathlib import Path

from consumer.commands.exits import MEANINGS, Exit, listed
from tests.support.command import run_command

README = Path(__file__).parents[2] / "README.md"


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


def test_the_readme_lists_the_same_codes() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {f"{code:d}": meaning for code, meaning in MEANINGS.items()}


def test_the_line_begins_with_success() -> None:
    assert listed().startswith("Exit codes: 0 done · 1 ")


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in help_of()
