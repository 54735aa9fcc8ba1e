# SPDX-License-Identifier: Apache-2.0
"""``doctor`` on the time: this machine's clock beside a server's. Signatures, expiry and waiting times rest on it."""

from datetime import datetime
from typing import Final

from acestep_consumer.commands.doctor_report import Finding, fail, ok, warn

WARN_S: Final = 5.0
# S3 refuses signatures that are 15 minutes off.
REFUSED_S: Final = 900.0
_FIX: Final = "let the clock follow a time server: timedatectl set-ntp true"


def clock(check: str, there: datetime, here: datetime) -> Finding:
    """Compare two times, both with a time zone. A server's ``Date`` has whole seconds."""
    ahead_s = (here - there).total_seconds()
    if abs(ahead_s) <= WARN_S:
        return ok(check, "within a second or two of this machine's" if abs(ahead_s) > 1 else "equal to this machine's")
    said = f"this machine's clock is {abs(ahead_s):,.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    return fail(check, f"{said}: S3 refuses signatures", _FIX) if abs(ahead_s) >= REFUSED_S else warn(check, said, _FIX)
