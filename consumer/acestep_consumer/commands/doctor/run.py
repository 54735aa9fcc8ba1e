# SPDX-License-Identifier: Apache-2.0
"""Checks everything a worker needs, without changing anything."""

import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from rich.console import Console

from acestep_consumer.commands.base import note
from acestep_consumer.commands.doctor.machine import Machine
from acestep_consumer.commands.doctor.models import check_lm, check_models
from acestep_consumer.commands.doctor.probe import Probe, run
from acestep_consumer.commands.doctor.report import DoctorReport, Finding, fail, ok, skip, warn
from acestep_consumer.commands.doctor.table import show
from acestep_consumer.commands.terminal import silence_client
from acestep_consumer.commands.threads import run_in_thread
from acestep_consumer.config import settings as settings_module
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import BrokerSettings, Settings, SettingsError, StorageSettings

_SLOW = "this machine or its disk is busy: try again"
_SLOW_TORCH = "torch or the driver is slow to start; `acestep-consumer plan` waits longer"


async def doctor(*, as_json: bool, timeout_s: float) -> Exit:
    """Run all checks, of ``timeout_s`` seconds at most, and print the report; 0 unless one of them failed."""
    began = time.perf_counter()
    silence_client()
    findings = await _examine(os.environ, timeout_s)
    report = DoctorReport(findings=findings, took_s=round(time.perf_counter() - began, 2))
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        show(report, Console(highlight=False))
    return Exit.DONE if report.fit else Exit.UNFIT


async def _examine(environ: Mapping[str, str], timeout_s: float) -> tuple[Finding, ...]:
    try:
        settings = settings_module.load()
    except SettingsError as error:
        problems = (fail("settings", problem, _ALL_SETTINGS) for problem in str(error).splitlines())
        return (*problems, skip("the rest", "it depends on the settings"))
    found = await run(tuple(_probes(settings, environ, timeout_s)), timeout_s, on_slow=_print_slow)
    return (judge_settings(settings, environ), *found)


def _print_slow(names: str) -> None:
    note.print(f"waiting for an answer: {names} …", style="dim", soft_wrap=True)


_ALL_SETTINGS = "`acestep-consumer run --help` lists all settings"


def judge_settings(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """Report settings that have no effect, and what a worker warns of when it starts."""
    given = sum(name in environ for name in settings_module.known_variables())
    file = " and in .env" if Path(".env").is_file() else ""
    jobs = settings.broker.queue_workers or "auto"
    warnings = settings.broker.url_warnings
    ineffective = [f"{name} has no effect here: {reason}" for name, reason in settings.without_effect.items()]
    said = [f"valid; {given} set in the environment{file}; concurrent jobs: {jobs}", *warnings, *ineffective]
    return (warn if warnings else ok)("settings", "\n".join(said))


def _probes(settings: Settings, environ: Mapping[str, str], timeout_s: float) -> Iterator[Probe]:
    """Yield all probes, in the order of the report."""
    machine = Machine(settings, environ)
    yield Probe(
        check="broker",
        run=partial(_check_broker, settings, timeout_s),
        fix="is the address in ACESTEP_AMQP_URL right, and does a firewall let it through?",
    )
    yield Probe(
        check="management",
        run=partial(_check_management, settings, timeout_s),
        fix="is the address in ACESTEP_MANAGEMENT_URL right?",
    )
    yield Probe(
        check="storage",
        run=partial(_check_storage, settings),
        fix="is ACESTEP_S3_ENDPOINT right, and does a firewall let it through?",
    )
    yield Probe(check="packages", run=machine.packages, fix=_SLOW)
    yield Probe(check="device", run=machine.device, late="warn", fix=_SLOW_TORCH)
    yield Probe(check="compiler", run=machine.compiler, late="warn", fix=_SLOW_TORCH)
    yield Probe(check="models", run=partial(check_models, settings.engine, environ), late="warn", fix=_SLOW)
    yield Probe(check="language model", run=partial(check_lm, settings, machine, environ), late="skip")
    yield Probe(check="encoders", run=machine.encoders, late="warn", fix=_SLOW)
    yield Probe(
        check="scratch",
        run=machine.scratch,
        late="fail",
        fix="its file system hangs: use another folder, ACESTEP_SCRATCH_DIR",
    )
    yield Probe(check="port", run=machine.port, late="warn", fix=_SLOW)


# These need packages that take a second to import, and several on a busy machine. They are imported in threads: on the
# event loop they would delay the other probes.


async def _check_broker(settings: Settings, timeout_s: float) -> AsyncGenerator[Finding]:
    def load() -> Callable[[Settings, float], AsyncGenerator[Finding]]:
        from acestep_consumer.commands.doctor.broker import check_broker  # noqa: PLC0415 - see above

        return check_broker

    check = await run_in_thread(load)
    async for finding in check(settings, timeout_s):
        yield finding


async def _check_management(settings: Settings, timeout_s: float) -> AsyncGenerator[Finding]:
    def load() -> Callable[[BrokerSettings, float], AsyncGenerator[Finding]]:
        from acestep_consumer.commands.doctor.broker import check_management  # noqa: PLC0415 - see above

        return check_management

    check = await run_in_thread(load)
    async for finding in check(settings.broker, timeout_s):
        yield finding


async def _check_storage(settings: Settings) -> AsyncGenerator[Finding]:
    def load() -> Callable[[StorageSettings], AsyncGenerator[Finding]]:
        from acestep_consumer.commands.doctor.storage import check_storage  # noqa: PLC0415 - see above

        return check_storage

    check = await run_in_thread(load)
    async for finding in check(settings.storage):
        yield finding
