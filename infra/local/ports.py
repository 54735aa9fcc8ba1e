# SPDX-License-Identifier: Apache-2.0
"""Finds free loopback ports and reserves them against other stacks on this machine."""

from __future__ import annotations

import random
import socket
import sys

LOOPBACK = "127.0.0.1"

# Below Linux's range for outgoing connections (32768 and up), so none takes such a port while a server restarts.
_CANDIDATES = range(20_000, 32_000)
_TRIES = 1_000


class PortClaim:
    """Reserves `count` free TCP ports of 127.0.0.1 until `release()`.

    A port that is free now may be taken a moment later. So that two stacks started side by side do not choose the same
    one, each port is also reserved by a name in Linux's abstract socket namespace, which the kernel releases when this
    process ends, however it ends.
    """

    def __init__(self, count: int) -> None:
        self._claims: list[socket.socket] = []
        self.ports: tuple[int, ...] = tuple(self._claim_one() for _ in range(count))

    def _claim_one(self) -> int:
        for _ in range(_TRIES):
            port = random.choice(_CANDIDATES)  # noqa: S311  # chance keeps neighbours apart, it guards no secret
            if self._claimed(port) and _is_free(port):
                return port
        raise RuntimeError(f"no free TCP port between {_CANDIDATES.start} and {_CANDIDATES.stop} on {LOOPBACK}")

    def _claimed(self, port: int) -> bool:
        if sys.platform != "linux":
            return True
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim.bind(f"\0acestep-local-port-{port}")
        except OSError:
            claim.close()
            return False
        self._claims.append(claim)
        return True

    def release(self) -> None:
        """Release the ports; can be called again."""
        while self._claims:
            self._claims.pop().close()


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
