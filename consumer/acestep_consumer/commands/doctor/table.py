# SPDX-License-Identifier: Apache-2.0
"""Formats the report of ``doctor``: a line for each finding, below it the fix, at the end the counts."""

from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from acestep_consumer.commands.doctor.report import DoctorReport, Finding, Level

_STYLES: Final[dict[Level, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_LEVEL_WIDTH: Final = 4
_FIX_INDENT: Final = " " * (_LEVEL_WIDTH + 2)


def show(report: DoctorReport, console: Console) -> None:
    """Print the report. Results are wrapped on a terminal; fixes never, since they may be commands to copy."""
    width = max((len(finding.check) for finding in report.findings), default=0)
    for finding in report.findings:
        console.print(_row(finding, width, wrap=console.is_terminal), soft_wrap=not console.is_terminal)
        for line in _fix(finding):
            console.print(line, soft_wrap=True)
    console.print(_sum(report), soft_wrap=True)


def _row(finding: Finding, width: int, *, wrap: bool) -> Table | Text:
    level, check = finding.level.ljust(_LEVEL_WIDTH), finding.check.ljust(width)
    style = _STYLES[finding.level]
    if not wrap:
        indent = " " * (_LEVEL_WIDTH + width + 4)
        return Text.assemble((level, style), "  ", (check, "cyan"), "  ", finding.said.replace("\n", f"\n{indent}"))
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(width=_LEVEL_WIDTH, no_wrap=True)
    row.add_column(width=width, no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(Text(level, style), Text(check, "cyan"), Text(finding.said))
    return row


def _fix(finding: Finding) -> Iterator[Text]:
    for number, line in enumerate((finding.fix or "").splitlines()):
        yield Text.assemble(_FIX_INDENT, ("  " if number else "→ ", "bold"), line)


def _sum(report: DoctorReport) -> Text:
    levels: tuple[Level, ...] = ("ok", "warn", "fail", "skip")
    counts = ", ".join(f"{report.count(level)} {level}" for level in levels if report.count(level))
    verdict = "a worker can start here" if report.fit else "a worker cannot start here"
    return Text(f"{counts} in {report.took_s:.1f} s: {verdict}", style="green" if report.fit else "red")
