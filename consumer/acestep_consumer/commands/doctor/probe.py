# SPDX-License-Identifier: Apache-2.0
"""Probes run side by side, each within its time: one that hangs costs its own lines and nobody else's."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from acestep_consumer.commands.doctor.report import Finding, Level, fail

LONGEST_S, SHORTEST_S = 3.5, 2.0
# Of the five seconds that a person waits; the rest is for the end.
WHOLE_S = 4.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A look at one thing.

    Attributes:
        check: what it is called when it gives no answer.
        look: yields findings one by one, so that those before a hang are kept.
        late: how bad it is to get no answer in time.
        fix: what to do then.
    """

    check: str
    look: Callable[[], AsyncGenerator[Finding]]
    late: Level = "fail"
    fix: str | None = None


def limit_after(spent_s: float) -> float:
    """Return how long each probe may take when the program has run for so many seconds already."""
    return round(min(max(WHOLE_S - spent_s, SHORTEST_S), LONGEST_S), 1)


async def run(probes: Sequence[Probe], limit_s: float) -> tuple[Finding, ...]:
    """Run all at once, each for ``limit_s`` seconds at most; return their findings in the order of the probes.

    They begin from the last to the first: at the end of the list are those that start processes, which then work
    while the first ones import their packages.
    """
    tasks = [asyncio.create_task(_findings(probe, limit_s)) for probe in reversed(probes)]
    found = await asyncio.gather(*tasks)
    return tuple(finding for part in reversed(found) for finding in part)


async def _findings(probe: Probe, limit_s: float) -> list[Finding]:
    found: list[Finding] = []
    try:
        async with asyncio.timeout(limit_s), aclosing(probe.look()) as findings:
            async for finding in findings:
                found.append(finding)  # noqa: PERF401 - those before a hang are kept
    except TimeoutError:
        found.append(_late(probe, limit_s))
    except Exception as error:  # noqa: BLE001 - a probe that nobody foresaw to break must not hide the others' answers
        found.append(fail(probe.check, f"could not be checked: {type(error).__name__}: {error}"))
    return found


def _late(probe: Probe, limit_s: float) -> Finding:
    return Finding(check=probe.check, level=probe.late, said=f"no answer within {limit_s:g} s", fix=probe.fix)
