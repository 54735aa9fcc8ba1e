# SPDX-License-Identifier: Apache-2.0
"""Runs the probes of ``doctor`` concurrently, each with a time limit: one that hangs costs only its own lines.

A slow answer is no failure: a worker waits for it too. Only a refusal is one, or a silence for the whole limit.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from acestep_consumer.commands.doctor.report import Finding, Level, fail, warn

TIMEOUT_S = 30.0
SLOW_S = 5.0
"""An answer that takes longer is reported as slow. On a machine with nothing else to do all come within two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A check with a time limit.

    Attributes:
        check: its name if it gives no answer.
        run: yields findings one by one, so that those before a hang are kept.
        late: the level of no answer.
        fix: what to do then.
    """

    check: str
    run: Callable[[], AsyncGenerator[Finding]]
    late: Level = "fail"
    fix: str | None = None


async def run(
    probes: Sequence[Probe],
    timeout_s: float,
    slow_s: float = SLOW_S,
    on_slow: Callable[[str], None] = lambda _: None,
) -> tuple[Finding, ...]:
    """Run all probes concurrently and return their findings in the order of the probes.

    They are started from the last to the first: those at the end start processes, which then run while the first ones
    import their packages.

    Args:
        probes: in the order of the report.
        timeout_s: seconds that each may take.
        slow_s: seconds from which on an answer is reported as slow.
        on_slow: called after ``slow_s`` with the names of the probes that have not answered by then, unless all have.
    """
    tasks = [asyncio.create_task(_timed(probe, timeout_s), name=probe.check) for probe in reversed(probes)]

    def report_slow() -> None:
        on_slow(", ".join(task.get_name() for task in reversed(tasks) if not task.done()))

    timer = asyncio.get_running_loop().call_later(slow_s, report_slow)
    try:
        results = list(reversed(await asyncio.gather(*tasks)))
    finally:
        timer.cancel()
        await asyncio.wait(tasks)  # of those that are cancelled, `gather` waits for the first one only
    found = [finding for findings, _ in results for finding in findings]
    slow = [
        f"{probe.check} ({took_s:.0f} s)"
        for probe, (_, took_s) in zip(probes, results, strict=True)
        if took_s is not None and took_s > slow_s
    ]
    if slow:
        found.append(warn("speed", f"slow to answer: {', '.join(slow)}", _SLOW))
    return tuple(found)


_SLOW = "this machine, the network or a server is busy; a worker waits longer"


async def _timed(probe: Probe, timeout_s: float) -> tuple[list[Finding], float | None]:
    """Return the findings, and the seconds that they took; None: not all of them came."""
    began = time.monotonic()
    found, in_time = await _findings(probe, timeout_s)
    if in_time:
        return found, time.monotonic() - began
    said = f"no answer within {timeout_s:g} s"
    return [*found, Finding(check=probe.check, level=probe.late, said=said, fix=probe.fix)], None


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
