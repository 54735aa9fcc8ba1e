# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer gateway`: serves ACE-Step's REST API until Ctrl-C or SIGTERM."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final

import structlog
from rich.console import Console

from acestep_consumer.client.results import Results
from acestep_consumer.commands.base import print_error
from acestep_consumer.commands.http_site import cannot_bind, run_until_stopped, site
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.logs import set_log_level, set_up_logs
from acestep_consumer.config.settings import Settings, SettingsError
from acestep_consumer.domain.errors import DiskFull
from acestep_consumer.execution.scratch import ScratchRoot
from acestep_consumer.gateway.broker_session import client_of
from acestep_consumer.gateway.server import Gateway
from acestep_consumer.observability.tracing import TracingMisconfigured, set_up_tracing
from acestep_consumer.webui.origin_check import is_loopback

_CLOSE_S: Final = 10.0
"""How long open requests may take at the end."""
_STORAGE_RETRY_S: Final = 8.0
"""Clients give a request half a minute at most."""

log = structlog.get_logger()


async def gateway(settings: Settings, read_again: Callable[[], Settings], note: Console) -> Exit:
    """Serve the API until SIGTERM; SIGHUP reads the keys and the log level again."""
    host = settings.gateway.host
    if not settings.gateway.keys and not is_loopback(host):
        print_error(f"ACESTEP_API_HOST={host} is reachable for others: set ACESTEP_API_KEY, or use 127.0.0.1", note)
        return Exit.USAGE
    set_up_logs(settings.worker.log_level, settings.worker.log_format)
    try:
        set_up_tracing(f"{socket.gethostname()}-{os.getpid()}", "acestep-gateway")
        with ScratchRoot(settings.engine.scratch_dir) as scratch:
            return await _serve(settings, scratch, read_again, note)
    except TracingMisconfigured as error:
        print_error(str(error), note)
        return Exit.USAGE
    except (DiskFull, OSError) as error:
        print_error(f"no folder for uploads (ACESTEP_SCRATCH_DIR): {error}", note)
        return Exit.USAGE


async def _serve(settings: Settings, scratch: ScratchRoot, read_again: Callable[[], Settings], note: Console) -> Exit:
    host, port, loop = settings.gateway.host, settings.gateway.port, asyncio.get_running_loop()
    results, songs = (Results(settings.storage, retry_s=_STORAGE_RETRY_S) for _ in range(2))
    url = settings.broker.every_url.get_secret_value()
    served = Gateway(settings, lambda: client_of(url), results, songs, scratch.ensure)
    try:
        async with site(served.application(), host, port, close_s=_CLOSE_S, cancel_abandoned=True) as address:
            sys.stdout.write(f"{address}/\n")
            sys.stdout.flush()
            loop.add_signal_handler(signal.SIGHUP, _reload, served, read_again)
            await run_until_stopped(served.run())
    except OSError as error:
        print_error(cannot_bind(host, port, error), note)
        return Exit.USAGE
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        await results.close()
        await songs.close()
    return Exit.DONE


def _reload(served: Gateway, read_again: Callable[[], Settings]) -> None:
    """Accept the keys that are configured now. Without any, the old ones stay: else everybody would be let in."""
    try:
        settings = read_again()
    except SettingsError as error:
        log.warning("settings not reloaded", reason=str(error))
        return
    if not settings.gateway.keys and served.keys.required:
        log.warning("settings not reloaded", reason="ACESTEP_API_KEY is no longer set: restart to run without keys")
        return
    served.keys.replace(settings.gateway.keys)
    set_log_level(settings.worker.log_level)
    log.info("settings reloaded", keys=len(settings.gateway.keys))
