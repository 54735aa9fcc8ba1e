# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` finds, as plain data: a line for each check. ``--json`` prints it as it is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

Level = Literal["ok", "warn", "fail", "skip"]


class Finding(BaseModel):
    """One line.

    Attributes:
        check: what was looked at.
        level: ``ok``; ``warn``: a worker starts, and this is worth knowing; ``fail``: it would not, or could not work;
            ``skip``: not checked, and ``said`` is why.
        said: what was found.
        fix: what to do about it; None where nothing needs doing.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    level: Level
    said: str
    fix: str | None = None


class DoctorReport(BaseModel):
    """All lines, in the order in which a worker would meet these things. ``took_s``: seconds."""

    model_config = ConfigDict(frozen=True)

    findings: tuple[Finding, ...]
    took_s: float

    @computed_field  # type: ignore[prop-decorator] # pydantic's own way, which mypy does not know
    @property
    def fit(self) -> bool:
        """Whether nothing failed."""
        return not self.count("fail")

    def count(self, level: Level) -> int:
        """Return how many lines are of this level."""
        return sum(finding.level == level for finding in self.findings)


def ok(check: str, said: str) -> Finding:
    """Return a line about something that is as it should be."""
    return Finding(check=check, level="ok", said=said)


def warn(check: str, said: str, fix: str | None = None) -> Finding:
    """Return a line about something worth knowing that stops nothing."""
    return Finding(check=check, level="warn", said=said, fix=fix)


def fail(check: str, said: str, fix: str | None = None) -> Finding:
    """Return a line about something that stops a worker."""
    return Finding(check=check, level="fail", said=said, fix=fix)


def skip(check: str, why: str) -> Finding:
    """Return a line about something that could not be looked at."""
    return Finding(check=check, level="skip", said=f"not checked: {why}")
