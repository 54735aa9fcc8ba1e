# SPDX-License-Identifier: Apache-2.0
"""The stages of a worker in this process, without a broker: requests in, songs and manifests in a real S3."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load

from acestep_consumer.audio.codec import decode
from acestep_consumer.config.settings import InputSettings, StorageSettings
from acestep_consumer.domain.job import NO_SONGS, Request, Sources, TokenizedSource
from acestep_consumer.domain.objects import ObjectAddress
from acestep_consumer.domain.outcome import RunInfo, TerminalRecord, manifest
from acestep_consumer.engine.adapters import DirectPlanner, LmPlanner
from acestep_consumer.engine.messages import Render, TokenizeAudio
from acestep_consumer.engine.renderer.render import render, tokenize_audio
from acestep_consumer.engine.renderer.render_resources import RenderResources
from acestep_consumer.inputs.fetch import AllowedInputs
from acestep_consumer.inputs.source_songs import StoredSongs
from acestep_consumer.policy.admit import Limits, admit
from acestep_consumer.policy.tiers import BUILT_IN
from acestep_consumer.storage.results import ResultStore
from acestep_schemas.events import Completed, LmChoice, Timings
from acestep_schemas.request import parse_request
from tests.support.admission import FORMATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from acestep_consumer.domain.job import Job, Plan, Rendering
    from acestep_consumer.domain.ports import Objects, Report
    from acestep_consumer.engine.adapters import PlannerSupervisor

RATE = 48_000


@dataclass
class InProcessRenderer:
    """``ports.Renderer`` in this process."""

    resources: RenderResources

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        """Render in a thread."""
        message = Render(request_id=1, job=job, plan=plan, sources=sources, folder=folder)
        return await asyncio.to_thread(render, self.resources, message, report, lambda: False)

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        """Tokenize in a thread."""
        return await asyncio.to_thread(
            tokenize_audio, self.resources, TokenizeAudio(request_id=1, job=job, sources=sources), lambda: False
        )


class SongMaker:
    """Makes songs as a worker's pipeline does."""

    def __init__(
        self,
        resources: RenderResources,
        objects: Objects,
        settings: StorageSettings,
        language_model: PlannerSupervisor | None = None,
    ) -> None:
        self.objects = objects
        self.store = ResultStore(objects, settings)
        self._inputs = AllowedInputs(objects, settings, InputSettings())
        self._songs = StoredSongs(self.store, allowed=True)
        self._renderer = InProcessRenderer(resources)
        self._planner = LmPlanner(language_model, self._renderer) if language_model else DirectPlanner(self._renderer)
        self._limits = Limits(
            tier=BUILT_IN.tiers[-1],
            table_version=BUILT_IN.version,
            vram_gb=80,
            models=tuple(resources.scheduler.models.values()),
            formats=FORMATS,
            lm=LmChoice(model="acestep-5Hz-lm-0.6B", backend="pt") if language_model else None,
        )

    async def make(self, task_id: str, **fields: Any) -> Completed:
        """Make the songs of a request, and return the manifest, which is stored."""
        body, warnings = parse_request({"task_id": task_id, "audio_format": "wav32", **fields})
        job = admit(await self._songs.resolve(Request(task_id, body, warnings)), self._limits)
        job = replace(job, message=f"message-of-{task_id}")
        with tempfile.TemporaryDirectory() as folder:
            async with self._inputs:
                sources = await self._inputs.fetch(job, Path(folder))
            plan = await self._planner.plan(job, sources, lambda *_: None)
            rendering = NO_SONGS
            if not job.analysis:
                rendering = await self._renderer.render(job, plan, sources, Path(folder), lambda *_: None)
            stored = await self.store.put(job, rendering)
        ending = manifest(job, plan, rendering, stored, Timings(), RunInfo("worker-1", 1, datetime.now(UTC)))
        await self.store.commit(TerminalRecord(ending, job.message))
        return ending

    async def body(self, uri: str) -> bytes:
        """Return an object."""
        found = await self.objects.get(ObjectAddress.of(uri))
        assert found is not None, uri
        return found.body

    async def samples(self, song: Completed, index: int = 0) -> NDArray[np.float32]:
        """Return a song as it sounds, [2, samples]."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "song"
            path.write_bytes(await self.body(song.audios[index].uri))
            return decode(path, sample_rate=RATE, max_seconds=600)

    async def latents(self, song: Completed, index: int = 0) -> NDArray[np.float32]:
        """Return a song's final latents, [frames, channels]."""
        files = song.audios[index].files
        assert files is not None
        assert files.latents is not None
        return load(await self.body(files.latents.uri))["latents"].astype(np.float32)
