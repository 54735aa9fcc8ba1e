# SPDX-License-Identifier: Apache-2.0
"""RabbitMQ 4 beside the system's own version: the package of a newer Debian, in a root file system of its own.

``LOCAL_RABBITMQ=4`` (``bash infra/dev test --rabbitmq 4``) makes every local broker one of these. Making the
folder needs root and debootstrap, and takes one to three minutes; it is kept in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.local.process import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Without ACESTEP_ before it: the product refuses settings that it does not know.
VARIABLE: Final = "LOCAL_RABBITMQ"
SUITE: Final = "sid"
_MAKE_TIMEOUT_S: Final = 900
_SCRIPTS: Final = Path("/usr/lib/rabbitmq/bin")
# Erlang makes a table for as many files as it may open: with no limit that takes gigabytes.
_OPEN_FILES: Final = 20_000

# In a mount namespace of its own: whatever happens, nothing stays mounted. Every exec replaces the shell, so that the
# process that was started is the broker.
_ENTER: Final = """\
set -e
root=$1 folder=$2
shift 2
ulimit -n {files}
mkdir -p "$root/$folder"
mount --bind /proc "$root/proc"
mount --bind /dev "$root/dev"
mount --bind "$folder" "$root/$folder"
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""


def wanted() -> bool:
    """Whether local brokers are to be RabbitMQ 4. Raises ``ServerError`` for another version."""
    version = os.environ.get(VARIABLE, "")
    if version not in ("", "system", "4"):
        raise ServerError(f"{VARIABLE} = {version}: it may be 4, or system for the installed version")
    return version == "4"


def root_folder() -> Path:
    """Return where the root file system with RabbitMQ 4 is, or will be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "acestep-consumer" / f"rabbitmq-{SUITE}"


def is_installed() -> bool:
    """Whether it is there, and whole: it gets its name last."""
    return (root_folder() / _SCRIPTS.relative_to("/") / "rabbitmq-server").exists()


def script(name: str) -> str:
    """Return the path of one of RabbitMQ's scripts, as seen from inside."""
    return str(_SCRIPTS / name)


def inside(folder: Path, argv: Sequence[str]) -> list[str]:
    """Return the command that runs ``argv`` in the other root, with ``folder`` at the same path there."""
    enter = _ENTER.format(files=_OPEN_FILES)
    return ["unshare", "--mount", "sh", "-c", enter, "rabbitmq4", str(root_folder()), str(folder), *argv]


def install() -> None:
    """Make the root file system. Raises ``ServerError`` when that cannot be done here, with what to do."""
    if os.geteuid() != 0:
        raise ServerError("making a RabbitMQ 4 needs root (debootstrap, chroot); run this as root, or without it")
    if shutil.which("debootstrap") is None:
        _run(["apt-get", "update", "-qq"])
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap"])
    target = root_folder()
    print("Making a root file system with RabbitMQ 4, once (one to three minutes) ...", file=sys.stderr, flush=True)
    unfinished = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _run(["debootstrap", "--variant=minbase", "--include=rabbitmq-server", SUITE, str(unfinished)])
    (unfinished / "etc/hosts").write_text("127.0.0.1 localhost\n")
    unfinished.rename(target)


def try_out() -> None:
    """Enter the root file system once. Raises ``ServerError`` where that is not allowed, as in some containers."""
    with tempfile.TemporaryDirectory(prefix="acestep-rabbitmq4-") as folder:
        _run(inside(Path(folder), ["test", "-x", script("rabbitmq-server")]))


def _run(argv: list[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=_MAKE_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise ServerError(f"{argv[0]} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")
