# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer run`: signals during start, and the group of workers that ``--gpus`` starts."""

import asyncio
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import structlog

from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.config.settings import Settings
from acestep_consumer.multi_gpu import device_count, placement, selection
from acestep_consumer.multi_gpu.parent import WorkerGroup
from acestep_consumer.multi_gpu.parent_pipe import exit_with_parent

log = structlog.get_logger()


def exit_quietly_on_signals() -> None:
    """Exit with 0 on SIGTERM and Ctrl-C, until the worker handles them itself: no job has been taken yet."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(Exit.DONE)


def run_group(gpus: str, settings: Settings, given: dict[str, str], *, grace_s: float) -> int:
    """Run one worker per GPU until all have ended; returns the exit code.

    Args:
        gpus: ``all``, or GPU numbers, comma-separated.
        settings: shared by all workers.
        given: settings from the command line, by variable; workers get them in their environment.
        grace_s: seconds that running jobs may take after the first signal.
    """
    as_json = set_up_logs(settings.worker.log_level, settings.worker.log_format)
    environ = selection.in_pci_order(os.environ)
    try:
        numbers = selection.parse(gpus)
        placement.check(settings.engine)
        chosen = selection.choose(numbers, selection.visible(device_count.ask_torch(environ), environ))
        placements = placement.place(chosen, settings, log_format="json" if as_json else "console")
    except (selection.BadChoice, placement.ConflictingSetting) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        return Exit.USAGE
    except (device_count.DeviceCountFailed, selection.GpuMissing) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - as above
        return Exit.ENGINE
    workers = {each.name: each.environment["ACESTEP_WORKER_ID"] for each in placements}
    log.info("starting one worker per GPU", workers=workers)
    command = [sys.executable, "-m", "acestep_consumer", "run", "--grace", str(grace_s)]
    return asyncio.run(WorkerGroup(placements, command, environ | given, labelled=not as_json).run())


def join_group(worker_end: int, settings: Settings) -> None:
    """Make this process a worker of a group: it ends with the parent, and its log lines carry its worker id.

    ``worker_end`` is the file descriptor of the parent's pipe.
    """
    labelled = settings.worker.log_format == "console"
    exit_with_parent(worker_end, labelled=labelled)
    if not labelled:
        structlog.contextvars.bind_contextvars(worker=settings.worker.worker_id)
