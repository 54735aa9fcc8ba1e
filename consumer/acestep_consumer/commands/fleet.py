# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer run --gpus``: a worker for each GPU."""

import asyncio
import os
import sys

import structlog

from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.logs import set_up_logs
from acestep_consumer.config.settings import Settings
from acestep_consumer.multi_gpu import device_count, placement, selection
from acestep_consumer.multi_gpu.parent import WorkerGroup
from acestep_consumer.multi_gpu.parent_pipe import leave_with_fleet

log = structlog.get_logger()


def run_fleet(asked: str, settings: Settings, given: dict[str, str], *, grace_s: float) -> int:
    """Run a worker at each GPU until all have left; returns the exit code.

    Args:
        asked: ``all``, or the GPUs' numbers, comma-separated.
        settings: what all workers share.
        given: settings from the command line, by variable; workers read them from their environment.
        grace_s: seconds that work in hand may take after the first signal.
    """
    as_json = set_up_logs(settings.worker.log_level, settings.worker.log_format)
    environ = selection.ordered(os.environ)
    try:
        numbers = selection.parse(asked)
        placement.check(settings.engine)
        chosen = selection.choose(numbers, selection.visible(device_count.take(environ), environ))
        places = placement.seats_for(chosen, settings, log_format="json" if as_json else "console")
    except (selection.BadChoice, placement.ConflictingSetting) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the text is the whole story
        return Exit.USAGE
    except (device_count.DeviceCountFailed, selection.GpuMissing) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - as above
        return Exit.ENGINE
    log.info("fleet starts", workers={seat.name: seat.environment["ACESTEP_WORKER_ID"] for seat in places})
    command = [sys.executable, "-m", "acestep_consumer", "run", "--grace", str(grace_s)]
    return asyncio.run(WorkerGroup(places, command, environ | given, labelled=not as_json).run())


def join_fleet(lifeline: int, settings: Settings) -> None:
    """Make this process a worker of a fleet: it ends with it, and its lines of log can be told from the others'.

    ``lifeline`` is the file descriptor that the fleet handed down.
    """
    labelled = settings.worker.log_format == "console"
    leave_with_fleet(lifeline, labelled=labelled)
    if not labelled:
        structlog.contextvars.bind_contextvars(worker=settings.worker.worker_id)
