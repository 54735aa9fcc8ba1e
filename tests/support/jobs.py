# SPDX-License-Identifier: Apache-2.0
"""Jobs, tracks and manifests for tests, complete and plausible, with what a test cares about as arguments."""

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acestep_consumer.domain import outcome
from acestep_consumer.domain.job import Job, Rendering, StoredObject, Track
from acestep_schemas.events import (
    Completed,
    ErrorCode,
    ErrorReport,
    LimitsReport,
    Metas,
    ModelChoice,
    PolicyReport,
    Timings,
    Unfinished,
)
from acestep_schemas.request import GenerationRequest


def make_job(*, task_id: str | None = None, message: str = "m1", **request_fields: Any) -> Job:
    """Return an admitted job with ``request_fields`` in its request, and a task id of its own."""
    request = GenerationRequest(**{"prompt": "a waltz", **request_fields})
    return Job(
        task_id=task_id or uuid.uuid4().hex,
        request=request,
        model=ModelChoice(requested=request.model, used="acestep-v15-turbo", fallback=False),
        lm=None,
        policy=make_policy(),
        seeds=tuple(range(1, request.batch_size + 1)),
        message=message,
    )


def make_policy() -> PolicyReport:
    """Return the report of a machine without a GPU."""
    limits = LimitsReport(max_duration_s=180, max_batch_size=1)
    return PolicyReport(tier="tier1", vram_gb=0, lm_loaded=False, table_version="acestep-1.5-2026-02", limits=limits)


def make_track(path: Path, content: bytes = b"RIFF", *, seed: int = 1, content_type: str = "audio/wav") -> Track:
    """Write ``content`` to ``path`` and return it as a track of 1.5 s."""
    path.write_bytes(content)
    return Track(
        path=path,
        seed=seed,
        format=path.suffix.removeprefix("."),
        content_type=content_type,
        sample_rate=48_000,
        channels=2,
        duration_s=1.5,
    )


def make_rendering(*tracks: Track) -> Rendering:
    """Return what a renderer would for these tracks."""
    return Rendering(tracks=tracks, render_s=0.25, encode_s=0.0625)


def make_manifest(job: Job, stored: tuple[StoredObject, ...] = (), *, worker_id: str = "worker-1") -> Completed:
    """Return the manifest of ``job`` once ``stored`` lies in S3."""
    return Completed(
        task_id=job.task_id,
        attempt=1,
        worker_id=worker_id,
        finished_at=datetime.now(UTC),
        model=job.model,
        lm=job.lm,
        policy=job.policy,
        audios=tuple(map(outcome._audio, stored)),
        request=job.request,
        metas=Metas(caption=job.request.prompt, duration=1.5),
        timings=Timings(render=0.1, total=1 / 3),
    )


def make_failure(task_id: str, message: str = "it broke") -> Unfinished:
    """Return the end of a task that came to nothing."""
    error = ErrorReport(code=ErrorCode.RENDER_FAILED, message=message, retryable=False, attempts=1)
    return Unfinished(
        task_id=task_id,
        status="failed",
        attempt=1,
        worker_id="worker-1",
        finished_at=datetime.now(UTC),
        error=error,
        policy=make_policy(),
    )
