# SPDX-License-Identifier: Apache-2.0
"""What the README tells a newcomer to type works."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from acestep_schemas.events import JobCompleted, parse_event
from tests.support.readme import PAGES, README, shell_blocks, shell_lines, text_of
from tests.support.worker import COMMAND, ROOT, clean_environment


def test_the_demo_makes_a_song_and_prints_its_event_and_where_it_is() -> None:
    """``infra/dev demo`` is set-up, which this environment has had, and then this."""
    done = subprocess.run(
        [sys.executable, "-m", "infra.local", "demo"],
        cwd=ROOT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    event_file, path = done.stdout.splitlines()
    event = parse_event(Path(event_file).read_bytes())
    assert isinstance(event, JobCompleted)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == event.data.audios[0].sha256
    assert event.data.audios[0].uri in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 300, "a line that nobody can read"
    assert "random weights" in done.stderr
    assert "ACESTEP_CHECKPOINT_DIR" in done.stderr


def test_the_commands_to_try_by_hand_work_in_the_order_in_which_they_are_printed(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """The README's block without its first two lines and its last word: the servers are there and stay."""
    (block,) = [
        block for block in shell_blocks(README) if "acestep-consumer run" in block and "tiny-checkpoint" in block
    ]
    up, activate, *lines, end = block.splitlines()
    assert up.startswith('eval "$(bash infra/dev up)"')
    assert activate == ". .venv/bin/activate"
    assert end.startswith("kill %1; wait; bash infra/dev down")
    script = "\n".join(("trap 'kill $(jobs -p); wait' EXIT", "set -e", *lines, "kill %1; wait; trap - EXIT"))
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ACESTEP_HTTP_PORT": "0"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=clean_environment(service_environment | variables),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (song,) = (tmp_path / "songs").iterdir()
    assert song.stat().st_size > 1000
    log = (tmp_path / "worker.log").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert log.count("\n") > 3, "the worker's log is in its file, and not between the lines of `submit`"


def test_every_verb_of_infra_dev_in_the_documentation_is_known() -> None:
    usage = subprocess.run(["bash", "infra/dev", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    verbs = {found for page in PAGES for found in re.findall(r"bash infra/dev (\w+)", text_of(page))}
    assert {"demo", "test", "up", "soak"} <= verbs
    assert [verb for verb in verbs if not re.search(rf"^  {verb}\b", usage, re.MULTILINE)] == []


def test_every_command_in_the_documentation_takes_the_flags_it_is_given() -> None:
    lines = [line for line in shell_lines(*PAGES) if "acestep-consumer " in line]
    assert len(lines) >= 12
    flags: dict[str, set[str]] = {}
    for line in lines:
        _, name, *words = shlex.split(line[line.index("acestep-consumer ") :].rstrip("& "))
        flags.setdefault(name, set()).update(word for word in words if word.startswith("--"))
    for name, given in flags.items():
        shown = subprocess.run([*COMMAND, name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert [flag for flag in given if flag not in shown] == [], name


def test_every_command_that_the_documentation_names_exists() -> None:
    shown = subprocess.run([*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {found for page in PAGES for found in re.findall(r"`acestep-consumer ([a-z-]+)", text_of(page))}
    assert {"run", "submit", "doctor", "plan", "dead"} <= named
    assert [name for name in named if not re.search(rf"^\W*{name}\b", shown, re.MULTILINE)] == []
