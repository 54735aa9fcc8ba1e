# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer listen`: serves the web page until Ctrl-C."""

import asyncio
import sys
import webbrowser
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from acestep_consumer.broker.errors import BrokerError, BrokerRefused
from acestep_consumer.broker.inspection import BrokerInspection, QueueDepth
from acestep_consumer.broker.topology import GENERATE, NOTICES, tier_queue
from acestep_consumer.client import Client, ClientError
from acestep_consumer.client.results import Results
from acestep_consumer.client.uploads import UploadStore
from acestep_consumer.commands.base import print_client_error, print_error, print_warning
from acestep_consumer.commands.http_site import cannot_bind, run_until_stopped, site
from acestep_consumer.commands.terminal import BROKER, silence_client, waiting_for
from acestep_consumer.commands.threads import run_in_thread
from acestep_consumer.commands.topology import tier_names
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import Settings
from acestep_consumer.policy.tiers import TierTableError
from acestep_consumer.webui.audio_proxy import AudioProxy
from acestep_consumer.webui.job_board import JobBoard, QueueState, add_events, look_up_silent_jobs, poll_queue_state
from acestep_consumer.webui.origin_check import OriginCheck, is_loopback
from acestep_consumer.webui.server import PageServer
from acestep_consumer.webui.source_upload import SourceUpload

# How long open requests may take at the end: a song that is playing is cut off.
_CLOSE_S: Final = 1.0
_NAME: Final = "acestep-consumer listen"
# A broker whose machine lost power does not even refuse.
_POLL_TIMEOUT_S: Final = 5.0
_STATUS_REQUEST_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Options of ``listen``. ``names``: additional host names; ``show``: open the page in a browser."""

    host: str
    port: int
    names: tuple[str, ...]
    show: bool


async def listen(settings: Settings, options: ListenOptions, note: Console) -> Exit:
    """Serve the page until Ctrl-C or SIGTERM, or until the broker refuses the subscription."""
    silence_client()
    try:
        with waiting_for(BROKER, note) as connected:
            async with Client(settings.broker.every_url.get_secret_value(), storage=settings.storage) as client:
                connected()
                return await _serve(client, settings, options, note)
    except TierTableError as error:
        print_error(str(error), note)
        return Exit.USAGE
    except ClientError as error:
        return print_client_error(error, note)


async def _serve(client: Client, settings: Settings, options: ListenOptions, note: Console) -> Exit:
    queue, board, endings = _QueuePoll(settings, note), JobBoard(), Results(settings.storage)
    try:
        async with client.subscribe("job.#", "worker.#") as events:
            songs = AudioProxy(settings.storage, endings, board.audios_of)
            upload = SourceUpload(UploadStore(endings, settings.storage), settings.inputs.max_bytes)
            page = PageServer(client, board, songs, endings, upload)
            app = page.application(OriginCheck(options.host, options.names))
            try:
                async with site(app, options.host, options.port, close_s=_CLOSE_S) as url:
                    await _announce(f"{url}/", options, note)
                    await run_until_stopped(
                        add_events(events, board),
                        look_up_silent_jobs(board, endings),
                        poll_queue_state(queue, board),
                        _request_statuses(client),
                    )
            except OSError as error:
                print_error(cannot_bind(options.host, options.port, error), note)
                return Exit.USAGE
    finally:
        await queue.close()
        await endings.close()
    return Exit.DONE


class _QueuePoll:
    """Polls the depth of the request queues over its own connection, and reconnects when that is lost.

    Raises ``TierTableError`` where requests are forwarded by tier and the tier table is invalid.
    """

    def __init__(self, settings: Settings, note: Console) -> None:
        self._settings = settings.broker
        self._tiers = tier_names(settings) or ()
        self._note = note
        self._connected = True
        self._stack = AsyncExitStack()
        self._inspection: BrokerInspection | None = None

    async def __call__(self) -> QueueState:
        """Poll once; print a line when the broker becomes unreachable or comes back."""
        state = await self._poll()
        if state.broker is not self._connected:
            self._connected = state.broker
            if state.broker:
                self._note.print("connected to the broker again", style="dim")
            else:
                print_warning("broker unreachable, reconnecting; press Ctrl-C to stop", self._note)
        return state

    async def close(self) -> None:
        """Close the connection."""
        self._inspection = None
        await self._stack.aclose()

    async def _poll(self) -> QueueState:
        try:
            async with asyncio.timeout(_POLL_TIMEOUT_S):
                depth = await self._depth(GENERATE)
                forwarded = await self._forwarded() if depth else 0
                # Busy workers may have no consumer on the request queue, but each has one on the notices.
                busy = await self._depth(NOTICES) if depth and not depth.consumers else None
        except BrokerRefused:
            return QueueState(broker=True)  # this login may not read queue depths
        except (BrokerError, TimeoutError):
            await self.close()
            return QueueState(broker=False)
        if depth is None:
            return QueueState(broker=True, declared=False)
        return QueueState(broker=True, waiting=depth.ready + forwarded, workers=(busy or depth).consumers)

    async def _forwarded(self) -> int:
        """Count requests that wait in tier queues. A worker declares them all: if one is missing, so are the rest."""
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


async def _announce(url: str, options: ListenOptions, note: Console) -> None:
    sys.stdout.write(url + "\n")
    sys.stdout.flush()
    if not is_loopback(options.host):
        print_warning(
            f"{options.host} exposes this page to the network, and there is no login: everyone who reaches it can "
            "hear all songs, submit and cancel. Safer: 127.0.0.1 with `ssh -L`, or a proxy with a login.",
            note,
        )
    note.print("serving; press Ctrl-C to stop", style="dim")
    if options.show and not await run_in_thread(lambda: webbrowser.open(url)):
        note.print("no browser found; open the address by hand")


async def _request_statuses(client: Client) -> None:
    """Ask the workers now and then what they are and how long they take; without answers, the page does without."""
    while True:
        with suppress(ClientError):
            await client.request_statuses()
        await asyncio.sleep(_STATUS_REQUEST_S)
