# SPDX-License-Identifier: Apache-2.0
"""``listen``: the page to hear the songs, from its start to Ctrl-C."""

import asyncio
import signal
import sys
import webbrowser
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from rich.console import Console

from acestep_consumer.broker.errors import BrokerError, BrokerRefused
from acestep_consumer.broker.inspection import BrokerInspection, QueueDepth
from acestep_consumer.broker.topology import GENERATE, tier_queue
from acestep_consumer.client import Client, ClientError
from acestep_consumer.client.results import Results
from acestep_consumer.commands.errors import refused
from acestep_consumer.commands.terminal import hush
from acestep_consumer.commands.threads import aside
from acestep_consumer.commands.tier_names import tier_names
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_consumer.policy.tiers import TierTableError
from acestep_consumer.webui.audio_proxy import AudioProxy
from acestep_consumer.webui.job_board import JobBoard, QueueState, add_events, look_up_silent_jobs, poll_queue_state
from acestep_consumer.webui.origin_check import OriginCheck, is_loopback
from acestep_consumer.webui.server import PageServer

# Songs that somebody listens to are cut at the end; pages are let go before.
_CLOSE_S: Final = 1.0
_NAME: Final = "acestep-consumer listen"
# A broker whose machine lost its power says nothing at all.
_LOOK_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where the page is served. ``names``: more host names that it is called by; ``show``: open it in a browser."""

    host: str
    port: int
    names: tuple[str, ...]
    show: bool


async def listen(settings: Settings, stand: ListenOptions, note: Console) -> Exit:
    """Serve the page until Ctrl-C or SIGTERM, or until the broker refuses to tell more."""
    hush()
    try:
        async with Client(settings.broker.every_url.get_secret_value(), storage=settings.storage) as client:
            return await _serve(client, settings, stand, note)
    except TierTableError as error:
        note.print(str(error), style="red", markup=False, soft_wrap=True)
        return Exit.USAGE
    except ClientError as error:
        return refused(error, note)


async def _serve(client: Client, settings: Settings, stand: ListenOptions, note: Console) -> Exit:
    glance, board, endings = _QueuePoll(settings, note), JobBoard(), Results(settings.storage)
    try:
        async with client.subscribe("job.#") as events, AudioProxy(settings.storage, endings, board) as songs:
            app = PageServer(client, board, songs, endings).application(OriginCheck(stand.host, stand.names))
            try:
                async with _site(app, stand) as url:
                    await _welcome(url, stand, note)
                    await _until_the_end(
                        add_events(events, board), look_up_silent_jobs(board, endings), poll_queue_state(glance, board)
                    )
            except OSError as error:
                note.print(_no_place(stand, error), style="red", markup=False)
                return Exit.USAGE
    finally:
        await glance.close()
        await endings.close()
    return Exit.DONE


class _QueuePoll:
    """How the queues of requests are, over a connection of its own, which is made again when it was lost.

    Raises ``TierTableError`` where requests are sent on, and the tiers cannot be read.
    """

    def __init__(self, settings: Settings, note: Console) -> None:
        self._settings = settings.broker
        self._tiers = tier_names(settings) or ()
        self._note = note
        self._there = True
        self._stack = AsyncExitStack()
        self._inspection: BrokerInspection | None = None

    async def __call__(self) -> QueueState:
        """Look, and note when the broker went or came."""
        pulse = await self._look()
        if pulse.broker is not self._there:
            self._there = pulse.broker
            words = "the broker is back" if pulse.broker else "the broker is away; it is waited for, Ctrl-C ends"
            self._note.print(words, style="dim" if pulse.broker else "yellow", markup=False)
        return pulse

    async def close(self) -> None:
        """Leave the broker."""
        self._inspection = None
        await self._stack.aclose()

    async def _look(self) -> QueueState:
        try:
            async with asyncio.timeout(_LOOK_S):
                depth = await self._depth(GENERATE)
                sent_on = await self._sent_on() if depth else 0
        except BrokerRefused:
            return QueueState(broker=True)  # this login may not look
        except (BrokerError, TimeoutError):
            await self.close()
            return QueueState(broker=False)
        if depth is None:
            return QueueState(broker=True, declared=False)
        return QueueState(broker=True, waiting=depth.ready + sent_on, workers=depth.consumers)

    async def _sent_on(self) -> int:
        """Requests that wait for larger cards. A worker declares the queues of all tiers: with one missing, none is."""
        ready = 0
        for tier in reversed(self._tiers):
            depth = await self._depth(tier_queue(tier))
            if depth is None:
                break
            ready += depth.ready
        return ready

    async def _depth(self, queue: str) -> QueueDepth | None:
        if self._inspection is None:
            self._inspection = await self._stack.enter_async_context(BrokerInspection(self._settings, _NAME))
        return await self._inspection.depth(queue)


@asynccontextmanager
async def _site(app: web.Application, stand: ListenOptions) -> AsyncIterator[str]:
    """Listen; the page's URL. Raises ``OSError`` when the address cannot be had."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, stand.host, stand.port).start()
        host = f"[{stand.host}]" if ":" in stand.host else stand.host
        yield f"http://{host}:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def _welcome(url: str, stand: ListenOptions, note: Console) -> None:
    sys.stdout.write(url + "\n")
    sys.stdout.flush()
    if not is_loopback(stand.host):
        note.print(
            f"warning: {stand.host} is open to others, and there is no login: whoever reaches this page can hear all "
            "songs, submit and cancel. Safer: 127.0.0.1 with `ssh -L`, or a proxy with a login.",
            style="yellow",
            markup=False,
        )
    note.print("listening; Ctrl-C ends", style="dim")
    if stand.show and not await aside(lambda: webbrowser.open(url)):
        note.print("no browser was found here; open the address yourself", markup=False)


async def _until_the_end(*works: Coroutine[Any, Any, None]) -> None:
    """Work until SIGTERM, or until one of these fails. Raises what it failed of."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    tasks = {asyncio.create_task(work) for work in (*works, _wait(ended))}
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _wait(ended: asyncio.Event) -> None:
    await ended.wait()


def _no_place(stand: ListenOptions, error: OSError) -> str:
    return f"{stand.host}:{stand.port}: {error.strerror}; is another one running? --port 0 takes a free port"
