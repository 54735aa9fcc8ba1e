# SPDX-License-Identifier: Apache-2.0
"""``doctor`` for eyes: a line for each finding, below it what to do, at the end how many of each kind."""

from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.text import Text

from acestep_consumer.commands.doctor.report import DoctorReport, Finding, Level

_STYLES: Final[dict[Level, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_LEVEL_WIDTH: Final = 6


def show(report: DoctorReport, console: Console) -> None:
    """Print all lines. Never cut or wrapped: a fix may be a command that is to be copied."""
    width = max((len(finding.check) for finding in report.findings), default=0) + 2
    for finding in report.findings:
        for line in _lines(finding, width):
            console.print(line, soft_wrap=True)
    console.print(_sum(report), soft_wrap=True)


def _lines(finding: Finding, width: int) -> Iterator[Text]:
    first, *more = finding.said.splitlines()
    yield Text.assemble(
        (finding.level.ljust(_LEVEL_WIDTH), _STYLES[finding.level]), (finding.check.ljust(width), "cyan"), first
    )
    indent = " " * (_LEVEL_WIDTH + width)
    for line in more:
        yield Text(indent + line)
    for number, line in enumerate((finding.fix or "").splitlines()):
        yield Text.assemble(indent, ("  " if number else "→ ", "bold"), line)


def _sum(report: DoctorReport) -> Text:
    levels: tuple[Level, ...] = ("ok", "warn", "fail", "skip")
    counts = ", ".join(f"{report.count(level)} {level}" for level in levels if report.count(level))
    verdict = "a worker can start here" if report.fit else "a worker cannot work here yet"
    return Text(f"{counts} in {report.took_s:.1f} s: {verdict}", style="green" if report.fit else "red")
