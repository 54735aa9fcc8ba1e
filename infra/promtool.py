# SPDX-License-Identifier: Apache-2.0
"""Finds Prometheus and promtool, which checks rules and configuration: on PATH, or extracted from Debian's package.

The package is not installed: that needs root, and would start a server at boot. The two programs are extracted and kept
in ``.local``. ``python -m infra.promtool ARGUMENT...`` runs promtool.
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
    "Prometheus is not on PATH and could not be extracted from Debian's package. Install it from its own site or your "
    f"distribution (on Debian and Ubuntu: apt-get install {PACKAGE}) and put prometheus and promtool on PATH."
)


class PromtoolMissingError(RuntimeError):
    """Prometheus is missing and cannot be extracted; the message says what to do."""


def tool(name: Tool) -> str:
    """Return the path of the program, downloading it once if necessary (20 MB, a few seconds).

    Raises:
        PromtoolMissingError: it is missing, and this is not Debian or Ubuntu with a reachable package mirror.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    KEPT.mkdir(parents=True, exist_ok=True)
    # Two test runs side by side download once.
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.access(KEPT / name, os.X_OK):
            _extract_from_package()
    return str(KEPT / name)


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool with these arguments and this input; ``stdout`` of the result has both outputs."""
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def _extract_from_package() -> None:
    with tempfile.TemporaryDirectory(prefix="acestep-promtool-") as folder:
        # apt downloads as a user of its own, who needs access to the folder.
        Path(folder).chmod(0o755)
        if not _download(folder):
            _try(["sudo", "-n", "apt-get", "update", "-qq"] if os.geteuid() else ["apt-get", "update", "-qq"], folder)
            _download(folder)
        package = next(Path(folder).glob(f"{PACKAGE}_*.deb"), None)
        if package is None or not _try(["dpkg-deb", "-x", str(package), folder], folder):
            raise PromtoolMissingError(_HOW_TO_GET_IT)
        for name in TOOLS:
            # Copied to a temporary name first, so that the program is never seen half written.
            part = KEPT / f"{name}.part"
            shutil.copy(Path(folder) / "usr" / "bin" / name, part)
            part.replace(KEPT / name)


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
