# SPDX-License-Identifier: Apache-2.0
"""Restricts a decoder process before it reads the first byte of the input: resource limits, and Landlock on Linux.

Limits on time, memory, output and open files hold everywhere. Where Linux has Landlock (5.13 or newer), the process
also loses access to the file system, and from 6.7 on to TCP: an input that exploits the decoder finds nothing to read
and no host to connect to.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
# The same on all processors, as every system call since 5.1.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_VERSION: Final = 1
# Rights that a version knows, as bits from 0 up. A right that a rule set handles is denied unless a rule allows it.
_FILE_RIGHTS: Final = ((5, 16), (3, 15), (2, 14), (1, 13))
_TCP_SINCE, _TCP_RIGHTS = 4, 0b11
_SCOPES_SINCE, _SCOPES = 6, 0b11  # no signals to others, no abstract sockets of others


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Resources of one decoder. Times in seconds; ``wall_s`` includes the time that it waits."""

    cpu_s: int
    wall_s: int
    memory_bytes: int
    output_bytes: int


def confine(limits: ProcessLimits) -> None:
    """Irrevocably drop all rights that decoding does not need. Everything must be imported before.

    Standard input, output and error stay open; no other file can be opened, and no process or thread started (root may
    still start some). The process is killed when its parent ends.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limits.wall_s)
    if sys.platform == "linux":
        _confine_on_linux()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits.cpu_s, grace=1)
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, limits.output_bytes)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, 3)


def landlock_version() -> int:
    """Return the version of Landlock that this kernel has; 0: none, or it is off."""
    if sys.platform != "linux":
        return 0
    version = ctypes.CDLL(None).syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    return max(int(version), 0)


def _limit(what: int, most: int, grace: int = 0) -> None:
    """Lower a limit, soft and hard; a lower one stays. At the soft one, the signal names the limit."""
    _, hard = resource.getrlimit(what)
    soft, hard = (limit if hard == resource.RLIM_INFINITY else min(limit, hard) for limit in (most, most + grace))
    resource.setrlimit(what, (soft, hard))


def _confine_on_linux() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    version = landlock_version()
    if version == 0:
        return
    attributes = _rule_set(version)
    rules = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0 or libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "Landlock was refused")
    os.close(rules)


def _rule_set(version: int) -> bytes:
    """Return the structure ``landlock_ruleset_attr`` as this version knows it: everything handled, nothing allowed."""
    files = next((1 << bits) - 1 for since, bits in _FILE_RIGHTS if version >= since)
    words = [files]
    if version >= _TCP_SINCE:
        words.append(_TCP_RIGHTS)
    if version >= _SCOPES_SINCE:
        words.append(_SCOPES)
    return struct.pack(f"={len(words)}Q", *words)
