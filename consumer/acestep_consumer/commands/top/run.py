# SPDX-License-Identifier: Apache-2.0
"""``top``: one worker at work, read from its own pages of metrics and health."""

import asyncio
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from rich.console import Console

from acestep_consumer.commands.terminal import drawing
from acestep_consumer.commands.top.report import (
    MetricsHistory,
    MetricsPage,
    MetricsUnreadable,
    TopReport,
    read_page,
    top_of,
)
from acestep_consumer.commands.top.table import picture
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import WorkerSettings

EVERY_S: Final = 1.0
_TIMEOUT_S: Final = 5.0
# What a server binds to that listens everywhere is no address to go to.
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}  # noqa: S104 - read, not bound
_ASKS_FOR: Final = {"Accept": "text/plain"}


@dataclass(frozen=True, slots=True)
class TopOptions:
    """What the flags say. ``once``: one answer, after a second in which rates are counted."""

    url: str
    once: bool
    as_json: bool


class NoWorker(Exception):
    """Nobody answers there, or somebody else, or there is no such place; the text says what to do."""


def address_of(worker: WorkerSettings) -> str:
    """Return where a worker with these settings listens.

    Raises:
        NoWorker: it takes a free port, which only its log tells.
    """
    if worker.http_port == 0:
        raise NoWorker("ACESTEP_HTTP_PORT is 0, so that a worker takes a free port: its log names it; give --url")
    host = _EVERYWHERE.get(worker.http_host, worker.http_host)
    bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{bracketed}:{worker.http_port}"


def completed(url: str) -> str:
    """Return an address as a URL: ``host:port`` will do.

    Raises:
        NoWorker: it is none.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number for a port
        fits = False
    if not fits:
        raise NoWorker(f"{url} is no address such as http://127.0.0.1:8080")
    return whole


async def top(order: TopOptions, note: Console) -> Exit:
    """Show the worker, once or until Ctrl-C."""
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as http:
            watcher = _MetricsPoll(http, order.url.rstrip("/"))
            first = await watcher.read()
            await (_once(watcher, order) if order.once or order.as_json else _watch(watcher, first))
    except NoWorker as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.UNREACHABLE
    return Exit.DONE


class _MetricsPoll:
    """Reads one worker's pages."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._recorder = MetricsHistory()

    async def read(self) -> TopReport:
        """Read both pages. Raises ``NoWorker``."""
        try:
            page = await self._page()
            readiness = await self._readiness()
        except (aiohttp.ClientConnectorError, ConnectionError) as error:
            raise NoWorker(
                f"nobody listens at {self._url}: does a worker run there? --url names another one; a worker's log "
                "says its address at the start (health=…)"
            ) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoWorker(f"no answer from {self._url}: {str(error) or type(error).__name__}") from error
        except (MetricsUnreadable, ValueError) as error:
            raise NoWorker(f"{self._url} answers, but {error}") from error
        self._recorder.add(page)
        return top_of(self._url, page, self._recorder, readiness)

    async def _page(self) -> MetricsPage:
        async with self._http.get(f"{self._url}/metrics", headers=_ASKS_FOR) as answer:
            if answer.status != HTTPStatus.OK:
                raise MetricsUnreadable(f"its /metrics says {answer.status}: is it a worker of this program?")
            return read_page(await answer.text(), time.monotonic())

    async def _readiness(self) -> dict[str, Any]:
        """Return the body of ``/readyz``; a worker that is not ready says so with 503."""
        async with self._http.get(f"{self._url}/readyz") as answer:
            if answer.status not in (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE):
                return {}
            body = await answer.json(content_type=None)
            return body if isinstance(body, dict) else {}


async def _once(watcher: _MetricsPoll, order: TopOptions) -> None:
    """Count for a second: a rate needs two readings."""
    while True:
        await asyncio.sleep(EVERY_S)
        seen = await watcher.read()
        if order.as_json:
            sys.stdout.write(seen.model_dump_json(indent=2 if order.once else None) + "\n")
            sys.stdout.flush()
        else:
            Console(highlight=False).print(picture(seen))
        if order.once:
            return


async def _watch(watcher: _MetricsPoll, seen: TopReport) -> None:
    """Draw it every second; a worker that goes away is waited for."""
    with drawing(Console(highlight=False)) as draw:
        while True:
            draw(picture(seen))
            await asyncio.sleep(EVERY_S)
            try:
                seen = await watcher.read()
            except NoWorker as error:
                draw(f"{error}; trying again. Ctrl-C ends")
