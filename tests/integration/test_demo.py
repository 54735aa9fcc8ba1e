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
from infra.tables import README
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


def test_the_commands_to_try_by_hand_work_in_the_order_in_which_they_are_printed(
    service_environment: dict[str, str], tmp_path: Path
) -> None:
    """The block after the servers are up and before ``watch``, which stays; the worker runs beside, as printed."""
    (block,) = [block for block in BLOCKS if "acestep-consumer run &" in block]
    lines = [line for line in block.splitlines() if line.startswith(("acestep-consumer", "ACESTEP_"))]
    lines = [line for line in lines if not line.startswith("acestep-consumer watch")]
    script = "\n".join(("trap 'kill $!; wait $!' EXIT", "set -e", *lines))
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ACESTEP_HTTP_PORT": "0"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=clean_environment(service_environment | variables),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (song,) = (tmp_path / "songs").iterdir()
    assert song.stat().st_size > 1000


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
