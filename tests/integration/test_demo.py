# SPDX-License-Identifier: Apache-2.0
"""What the README tells a newcomer to type works."""

import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

from infra.tables import README
from schemas.events import JobCompleted, parse_event
from tests.support.worker import COMMAND, ROOT, clean_environment

BLOCKS = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
LINES = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]


def test_the_demo_makes_a_song_and_prints_its_event_and_where_it_is() -> None:
    """``infra/dev demo`` is set-up, which this environment has had, and then this."""
    done = subprocess.run(
        [sys.executable, "-m", "infra.local", "demo"],
        cwd=ROOT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line, path = done.stdout.splitlines()
    event = parse_event(line.encode())
    assert isinstance(event, JobCompleted)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == event.data.audios[0].sha256
    assert "random weights" in done.stderr
    assert "ACESTEP_CHECKPOINT_DIR" in done.stderr


def test_every_verb_of_infra_dev_in_the_readme_is_known() -> None:
    usage = subprocess.run(["bash", "infra/dev", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    verbs = {found for line in LINES for found in re.findall(r"bash infra/dev (\w+)", line)}
    assert {"demo", "test", "up"} <= verbs
    assert all(re.search(rf"^  {verb}\b", usage, re.MULTILINE) for verb in verbs)


def test_every_command_in_the_readme_takes_the_flags_it_is_given() -> None:
    commands = [line for line in LINES if "acestep-consumer " in line]
    assert len(commands) >= 4
    for line in commands:
        _, name, *words = shlex.split(line[line.index("acestep-consumer ") :].rstrip("& "))
        shown = subprocess.run([*COMMAND, name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert [flag for flag in words if flag.startswith("--") and flag not in shown] == []
