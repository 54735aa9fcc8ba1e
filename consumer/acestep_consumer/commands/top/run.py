# SPDX-License-Identifier: Apache-2.0
"""Shows one worker live, from its ``/metrics`` and ``/readyz``."""

import asyncio
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from rich.console import Console

from acestep_consumer.commands.base import print_error
from acestep_consumer.commands.terminal import live_display
from acestep_consumer.commands.top.report import (
    MetricsHistory,
    MetricsPage,
    MetricsUnreadable,
    TopReport,
    read_page,
    top_of,
)
from acestep_consumer.commands.top.table import table
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.http import open_session
from acestep_consumer.config.settings import WorkerSettings

EVERY_S: Final = 1.0
_TIMEOUT_S: Final = 5.0
# Addresses that mean "all interfaces" to a server cannot be connected to.
_ALL_INTERFACES: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}  # noqa: S104 - read, not bound
_ACCEPT_TEXT: Final = {"Accept": "text/plain"}


@dataclass(frozen=True, slots=True)
class TopOptions:
    """Options of ``top``. ``once``: print once, after a second for the rates."""

    url: str
    once: bool
    as_json: bool


class NoWorker(Exception):
    """No worker answers at that address; the message says why and what to do."""


def address_of(worker: WorkerSettings) -> str:
    """Return the URL of a worker with these settings.

    Raises:
        NoWorker: it uses any free port, which only its log names.
    """
    if worker.http_port == 0:
        raise NoWorker("ACESTEP_HTTP_PORT is 0, so the worker chose a free port: its log names it; pass it with --url")
    host = _ALL_INTERFACES.get(worker.http_host, worker.http_host)
    bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{bracketed}:{worker.http_port}"


def completed(url: str) -> str:
    """Return an address as a URL; ``host:port`` gets ``http://``.

    Raises:
        NoWorker: it is not a URL.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        valid = False
    if not valid:
        raise NoWorker(f"{url} is not an address such as http://127.0.0.1:8080")
    return whole


async def top(options: TopOptions, note: Console) -> Exit:
    """Show the worker, once or until Ctrl-C."""
    try:
        async with open_session(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as http:
            poll = _MetricsPoll(http, options.url.rstrip("/"))
            first = await poll.read()
            await (_print(poll, options) if options.once or options.as_json else _watch(poll, first))
    except NoWorker as error:
        print_error(str(error), note)
        return Exit.UNREACHABLE
    return Exit.DONE


class _MetricsPoll:
    """Reads one worker's pages and keeps the last minute for rates."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._history = MetricsHistory()

    async def read(self) -> TopReport:
        """Read both pages. Raises ``NoWorker``."""
        try:
            page = await self._page()
            readiness = await self._readiness()
        except (aiohttp.ClientConnectorError, ConnectionError) as error:
            raise NoWorker(
                f"no worker at {self._url}: cannot connect. Pass its address with --url; a worker logs it at start "
                "(health=…)"
            ) from error
        except TimeoutError as error:
            raise NoWorker(f"no answer from {self._url} within {_TIMEOUT_S:g} s") from error
        except aiohttp.ClientError as error:
            raise NoWorker(f"no answer from {self._url}: {str(error) or type(error).__name__}") from error
        except (MetricsUnreadable, ValueError) as error:
            raise NoWorker(f"{self._url} answers, but {error}") from error
        self._history.add(page)
        return top_of(self._url, page, self._history, readiness)

    async def _page(self) -> MetricsPage:
        async with self._http.get(f"{self._url}/metrics", headers=_ACCEPT_TEXT) as answer:
            if answer.status != HTTPStatus.OK:
                raise MetricsUnreadable(f"its /metrics returned {answer.status}: is it an acestep-consumer worker?")
            return read_page(await answer.text(), time.monotonic())

    async def _readiness(self) -> dict[str, Any]:
        """Return the body of ``/readyz``; the status is 503 while a worker is not ready."""
        async with self._http.get(f"{self._url}/readyz") as answer:
            if answer.status not in (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE):
                return {}
            body = await answer.json(content_type=None)
            return body if isinstance(body, dict) else {}


async def _print(poll: _MetricsPoll, options: TopOptions) -> None:
    """Print a report after a second, since rates need two readings; with ``--json`` every second."""
    while True:
        await asyncio.sleep(EVERY_S)
        report = await poll.read()
        if options.as_json:
            sys.stdout.write(report.model_dump_json(indent=2 if options.once else None) + "\n")
            sys.stdout.flush()
        else:
            Console(highlight=False).print(table(report))
        if options.once:
            return


async def _watch(poll: _MetricsPoll, report: TopReport) -> None:
    """Draw a report every second, and keep trying while the worker is unreachable."""
    with live_display(Console(highlight=False)) as draw:
        draw(table(report))
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                draw(table(await poll.read()))
            except NoWorker as error:
                draw(f"{error}; retrying. Press Ctrl-C to stop")
