# SPDX-License-Identifier: Apache-2.0
"""Installs Debian's rabbitmq-server if it is missing: the only dependency that pip cannot install."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local.process import ServerError
from infra.local.rabbitmq import PACKAGE, scripts_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSTALL_TIMEOUT_S = 900

# The package starts a broker as a system service and enables it at boot, which policy-rc.d prevents: only the files are
# needed. An existing policy is left alone; ours is removed in any case.
_POLICY = Path("/usr/sbin/policy-rc.d")
_INSTALL = f"""
set -e
policy=$1
if [ ! -e "$policy" ] && [ ! -L "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\\nexit 101\\n' > "$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 {PACKAGE}
if command -v systemctl >/dev/null; then systemctl disable {PACKAGE} || true; fi
"""


def ensure_rabbitmq() -> None:
    """Install Debian's package unless RabbitMQ is installed.

    Raises:
        ServerError: it cannot be installed; the message says what to do.
    """
    if scripts_folder() is not None:
        return
    with _install_lock():
        if scripts_folder() is None:
            _install()


def _install() -> None:
    if shutil.which("apt-get") is None:
        raise ServerError(
            "RabbitMQ is not installed, and this is not Debian or Ubuntu. Install it (with rabbitmq-server on PATH), "
            "start Docker, or set ACESTEP_AMQP_URL to a running broker."
        )
    say = f"Installing {PACKAGE} with apt-get, once (about a minute); its system service is not started ..."
    print(say, file=sys.stderr, flush=True)
    done = subprocess.run(
        [*_as_root(), "/bin/sh", "-c", _INSTALL, "install", str(_POLICY)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode or scripts_folder() is None:
        raise ServerError(f"apt-get could not install {PACKAGE}:\n{(done.stdout + done.stderr).strip()[-3000:]}")


def _as_root() -> list[str]:
    if os.geteuid() == 0:
        return []
    may = shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
    if not may or may.returncode:
        raise ServerError(
            f"RabbitMQ is not installed, and installing it needs root. Run: sudo apt-get install {PACKAGE}\n"
            "or start Docker, or set ACESTEP_AMQP_URL to a running broker."
        )
    return ["sudo", "-n"]


@contextmanager
def _install_lock() -> Iterator[None]:
    """Hold a lock, so that two stacks started side by side install once."""
    with (Path(tempfile.gettempdir()) / f"acestep-install-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
