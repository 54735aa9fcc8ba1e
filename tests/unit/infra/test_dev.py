# SPDX-License-Identifier: Apache-2.0
"""``infra/dev test``: parts side by side, and compiled modules that are kept."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
DEV = (ROOT / "infra/dev").read_text(encoding="utf-8")


def bash(script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def test_a_part_that_fails_in_the_background_fails_the_whole_when_all_have_ended(tmp_path: Path) -> None:
    (tmp_path / ".local").mkdir()
    functions = DEV[DEV.index("# part NAME COMMAND") : DEV.index("fix() {")]
    script = f"""say() {{ printf '%s\\n' "$*" >&2; }}
root={tmp_path}
{functions}
breaks() {{ echo first; false; echo never; }}
works() {{ echo second; }}
begin "one part" works_or_breaks; begin "another" works
finish
echo on
"""
    good = bash(script.replace("works_or_breaks", "works"))
    assert (good.returncode, good.stdout) == (0, "on\n"), good.stderr
    bad = bash(script.replace("works_or_breaks", "breaks"))
    assert (bad.returncode, bad.stdout) == (1, "")
    assert re.fullmatch(r"-- one part ...\n-- another ...\nfirst\nsecond\n-- another: \d+ s\n", bad.stderr)


def test_compiled_modules_are_kept_whatever_the_image_sets() -> None:
    head = DEV[: DEV.index("usage() {")]
    done = bash(head + "\npython3 -c 'import sys; print(sys.dont_write_bytecode)'", PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout == "False\n", done.stderr
