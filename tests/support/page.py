# SPDX-License-Identifier: Apache-2.0
"""The page's own server on a free port, with a board that tests fill, and without a broker and a storage."""

from __future__ import annotations

import hashlib
import wave
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar, cast
from unittest.mock import patch

import numpy as np
from pydantic import BaseModel

from acestep_consumer.audio.peaks import peaks_of
from acestep_consumer.client.results import Results
from acestep_consumer.client.uploads import UploadStore
from acestep_consumer.commands.http_site import site
from acestep_consumer.config.settings import load
from acestep_consumer.webui.audio_proxy import AudioProxy
from acestep_consumer.webui.job_board import JobBoard, QueueState
from acestep_consumer.webui.origin_check import OriginCheck
from acestep_consumer.webui.server import PageServer
from acestep_consumer.webui.source_upload import SourceUpload
from acestep_schemas import examples
from acestep_schemas.events import Audio, JobCompleted, JobStarted
from acestep_schemas.request import GenerationRequest
from tests.support.gateway import FakeRequestClient, FakeResults
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Locator, Page

RATE = 8_000
MAX_UPLOAD_BYTES = 1_000_000
T = TypeVar("T", bound=BaseModel)


@dataclass
class ServedPage:
    """A page, and what is around it. ``client.published`` are the requests that it sent."""

    url: str
    board: JobBoard
    client: FakeRequestClient
    results: FakeResults

    def song(self, task_id: str, index: int = 0, seconds: float = 12.0, **audio: Any) -> Audio:
        """Store a song, a tone that swells, and return its entry for an event; ``audio`` replaces fields of that."""
        at = np.arange(int(seconds * RATE), dtype=np.float32) / RATE
        tone = (np.sin(2 * np.pi * (220 + 110 * index) * at) * at / seconds / 2).astype(np.float32)
        body = wav(tone)
        uri = f"s3://acestep/jobs/{task_id}/{index}.wav"
        self.results.stored[uri] = body
        facts: dict[str, Any] = {
            "uri": uri,
            "format": "wav",
            "sample_rate": RATE,
            "channels": 1,
            "duration_s": seconds,
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "seed": 7 + index,
            "peaks": peaks_of(tone[np.newaxis]),
        }
        return replaced(examples.completed().data.audios[0], facts | audio)

    def lyric_files(self, task_id: str, index: int = 0, *, folder: str = "") -> dict[str, Any]:
        """Store the lyrics of a song with times; returns ``files`` of its entry. ``folder``: of another job."""
        texts = {"lrc": "[00:01.00]Rain\n", "vtt": "WEBVTT\n\n00:01.000 --> 00:04.000\nRain\n"}
        found: dict[str, Any] = {}
        for kind, text in texts.items():
            body, uri = text.encode(), f"s3://acestep/jobs/{folder or task_id}/{index}.{kind}"
            self.results.stored[uri] = body
            digest = hashlib.sha256(body).hexdigest()
            found[kind] = {"uri": uri, "content_type": "text/html", "bytes": len(body), "sha256": digest}
        return found

    def complete(
        self,
        task_id: str,
        *audios: Audio,
        request: dict[str, Any] | None = None,
        **data: Any,
    ) -> None:
        """Show a job with these songs.

        ``request``: its fields; ``data`` replaces other fields of the event.
        """
        wanted = GenerationRequest.model_validate({"prompt": task_id} | (request or {}))
        changes = {"task_id": task_id, "request": wanted, "audios": audios, "policy": NO_CHANGES} | data
        self.board.add_event(JobCompleted.of(replaced(examples.completed().data, changes)))

    def start(self, task_id: str, **request: Any) -> None:
        """Show a job that a worker has begun, with these fields of its request."""
        wanted = GenerationRequest.model_validate({"prompt": task_id} | request)
        changes = {"task_id": task_id, "request": wanted, "policy": NO_CHANGES}
        self.board.add_event(JobStarted.of(examples.started().data.model_copy(update=changes)))


NO_CHANGES = examples.completed().data.policy.model_copy(update={"adjustments": ()})


def replaced(model: T, changes: dict[str, Any]) -> T:
    """Return a part of an event with other fields, which are validated as when it is read."""
    return type(model).model_validate({name: getattr(model, name) for name in type(model).model_fields} | changes)


def wav(tone: np.ndarray[Any, Any]) -> bytes:
    """Return a mono WAV file of 16 bits."""
    out = BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((tone * 32_767).astype("<i2").tobytes())
    return out.getvalue()


async def sent(page: Page, served: ServedPage) -> dict[str, Any]:
    """Send the form; returns what was published, without the id."""
    before = len(served.client.published)
    await page.get_by_role("button", name="Make it", exact=True).click()
    await eventually(lambda: len(served.client.published) > before)
    return {name: value for name, value in served.client.published[-1].items() if name != "task_id"}


def row(page: Page, task_id: str) -> Locator:
    """Return the row of a job."""
    return page.locator(f"#job-{task_id}")


@asynccontextmanager
async def served_page() -> AsyncIterator[ServedPage]:
    """Serve the page; its broker answers, with one worker and an empty queue."""
    client, results, board = FakeRequestClient(), FakeResults(), JobBoard()
    settings = load({}, env_file=None).storage
    stored = cast("Results", results)
    songs = AudioProxy(settings, stored, board.audios_of)
    server = PageServer(client, board, songs, stored, SourceUpload(UploadStore(stored, settings), MAX_UPLOAD_BYTES))
    board.set_queue_state(QueueState(broker=True, waiting=0, workers=1))
    # Updates come as they happen: tests need not wait for what spares a person's browser.
    with patch("acestep_consumer.webui.server.BETWEEN_UPDATES_S", 0.01):
        async with site(server.application(OriginCheck("127.0.0.1")), "127.0.0.1", 0, close_s=1) as url:
            yield ServedPage(url, board, client, results)
