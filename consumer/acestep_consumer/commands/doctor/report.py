# SPDX-License-Identifier: Apache-2.0
"""The report of ``doctor``: a finding for each check. ``--json`` prints it unchanged."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

Level = Literal["ok", "warn", "fail", "skip"]


class Finding(BaseModel):
    """The result of one check.

    Attributes:
        check: its name.
        level: ``ok``; ``warn``: a worker starts, but something is worth knowing; ``fail``: it cannot start or work;
            ``skip``: not checked, ``said`` gives the reason.
        said: the result.
        fix: what to do about it; None: nothing.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    level: Level
    said: str
    fix: str | None = None


class DoctorReport(BaseModel):
    """All findings, in the order in which a worker needs these things. ``took_s``: seconds."""

    model_config = ConfigDict(frozen=True)

    findings: tuple[Finding, ...]
    took_s: float

    @computed_field  # type: ignore[prop-decorator] # pydantic's own way, which mypy does not know
    @property
    def fit(self) -> bool:
        """Whether nothing failed."""
        return not self.count("fail")

    def count(self, level: Level) -> int:
        """Count the findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def ok(check: str, said: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check=check, level="ok", said=said)


def warn(check: str, said: str, fix: str | None = None) -> Finding:
    """Return a finding that does not stop a worker."""
    return Finding(check=check, level="warn", said=said, fix=fix)


def fail(check: str, said: str, fix: str | None = None) -> Finding:
    """Return a finding that stops a worker."""
    return Finding(check=check, level="fail", said=said, fix=fix)


def skip(check: str, why: str) -> Finding:
    """Return a finding about something that was not checked."""
    return Finding(check=check, level="skip", said=f"not checked: {why}")
