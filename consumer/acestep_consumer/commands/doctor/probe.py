# SPDX-License-Identifier: Apache-2.0
"""Runs the probes of ``doctor`` concurrently, each with a time limit: one that hangs costs only its own lines."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from acestep_consumer.commands.doctor.report import Finding, Level, fail, warn

LONGEST_S, SHORTEST_S = 3.5, 2.0
# Of the five seconds that a person waits; the rest is for the output.
WHOLE_S = 4.4
# Of the second try: a slow answer is no failure, only a long silence is.
RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A check with a time limit.

    Attributes:
        check: its name if it gives no answer.
        run: yields findings one by one, so that those before a hang are kept.
        late: the level of no answer, not even to the second try.
        fix: what to do then.
    """

    check: str
    run: Callable[[], AsyncGenerator[Finding]]
    late: Level = "fail"
    fix: str | None = None


def limit_after(spent_s: float) -> float:
    """Return the time limit of each probe if the program has already run for ``spent_s`` seconds."""
    return round(min(max(WHOLE_S - spent_s, SHORTEST_S), LONGEST_S), 1)


async def run(probes: Sequence[Probe], limit_s: float, retry_s: float = RETRY_S) -> tuple[Finding, ...]:
    """Run all probes concurrently and return their findings in the order of the probes.

    A probe that takes longer than ``limit_s`` seconds is tried once more, for ``retry_s``. They are started from the
    last to the first: those at the end start processes, which then run while the first ones import their packages.
    """
    tasks = [asyncio.create_task(_try_twice(probe, limit_s, retry_s)) for probe in reversed(probes)]
    results = list(reversed(await asyncio.gather(*tasks)))
    found = [finding for findings, _ in results for finding in findings]
    slow = [probe.check for probe, (_, retried) in zip(probes, results, strict=True) if retried]
    if slow:
        found.append(warn("speed", f"only the second try was answered in time: {', '.join(slow)}", _SLOW))
    return tuple(found)


_SLOW = "this machine, the network or a server is busy"


async def _try_twice(probe: Probe, limit_s: float, retry_s: float) -> tuple[list[Finding], bool]:
    """Return the findings, and whether it took a second try to get them all."""
    found, in_time = await _findings(probe, limit_s)
    if in_time:
        return found, False
    found, in_time = await _findings(probe, retry_s)
    if in_time:
        return found, True
    said = f"no answer within {limit_s:g} s, nor within {retry_s:g} s"
    return [*found, Finding(check=probe.check, level=probe.late, said=said, fix=probe.fix)], False


async def _findings(probe: Probe, limit_s: float) -> tuple[list[Finding], bool]:
    """Return the findings so far, and whether that is all of them."""
    found: list[Finding] = []
    try:
        async with asyncio.timeout(limit_s), aclosing(probe.run()) as findings:
            async for finding in findings:
                found.append(finding)  # noqa: PERF401 - those before a hang are kept
    except TimeoutError:
        return found, False
    except Exception as error:  # noqa: BLE001 - an unexpected error in one probe must not hide the others' findings
        found.append(fail(probe.check, f"could not be checked: {type(error).__name__}: {error}"))
    return found, True
