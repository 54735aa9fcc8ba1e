# SPDX-License-Identifier: Apache-2.0
"""Examples of each message, for the documents and for authors of producers. Built from the models, so valid."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final, get_args

from acestep_schemas.events import (
    Adjustment,
    Audio,
    Candidate,
    CloudEvent,
    Completed,
    Edit,
    ErrorCode,
    ErrorReport,
    FileObject,
    JobCompleted,
    JobEvent,
    JobProgress,
    JobStarted,
    LimitsReport,
    LmChoice,
    Loudness,
    LyricLine,
    LyricToken,
    Metas,
    ModelChoice,
    ParentSong,
    PolicyReport,
    Progress,
    SongFiles,
    StageJobs,
    StageLimitsReport,
    Started,
    TerminalEvent,
    Timings,
    Unfinished,
    Worker,
    WorkerEvent,
    type_of_unfinished,
    unfinished_event,
)
from acestep_schemas.request import GenerationRequest

TASK_ID: Final = "order-4711"
WORKER_ID: Final = "gpu-01-1"
_BEGAN: Final = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
_ENDED: Final = _BEGAN + timedelta(seconds=9)

REQUEST: Final[dict[str, Any]] = {
    "task_id": TASK_ID,
    "prompt": "slow jazz, brushed drums, double bass",
    "lyrics": "[inst]",
    "audio_duration": 900,
    "audio_format": "flac",
    "thinking": True,
    "seed": [42],
}
"""It requests more seconds than any tier allows, to show an adjustment in ``policy``."""

REPAINT: Final[dict[str, Any]] = {
    "task_id": "order-4712",
    "source_task_id": "order-4710",
    "task_type": "repaint",
    "repainting_start": 4,
    "repainting_end": 8,
    "candidates": 2,
}
"""It works on a song by its id, and keeps the better one of two."""

_MODEL: Final = ModelChoice(requested=None, used="acestep-v15-turbo", fallback=False)
_LM: Final = LmChoice(model="acestep-5Hz-lm-1.7B", backend="vllm")
_POLICY: Final = PolicyReport(
    tier="unlimited",
    vram_gb=143.8,
    lm_loaded=True,
    table_version="acestep-1.5-2026-02",
    limits=LimitsReport(max_duration_s=600, max_batch_size=8),
    adjustments=(
        Adjustment(
            field="audio_duration",
            requested=900,
            applied=600,
            reason="this worker allows 10 to 600 seconds of song",
        ),
    ),
)
_EFFECTIVE: Final = GenerationRequest.model_validate({**REQUEST, "audio_duration": 600})
_ERRORS: Final = {
    "failed": (ErrorCode.RESOURCE_EXHAUSTED, "the GPU has too little memory for this job alone", True, ()),
    "rejected": (
        ErrorCode.INVALID_REQUEST,
        "audio_format = midi: must be one of mp3, wav, wav32, flac, ogg, opus, aac",
        False,
        ({"field": "audio_format", "value": "midi", "rule": "must be one of mp3, wav, wav32, flac, ogg, opus, aac"},),
    ),
    "cancelled": (ErrorCode.CANCELLED, "cancelled on request", False, ()),
    "expired": (ErrorCode.EXPIRED, "it waited longer than its deadline allows", True, ()),
}


def started() -> JobStarted:
    """Return a ``started`` event."""
    data = Started(
        task_id=TASK_ID,
        attempt=1,
        worker_id=WORKER_ID,
        model=_MODEL,
        lm=_LM,
        policy=_POLICY,
        expected_s=9.0,
        request=_EFFECTIVE,
    )
    return JobStarted.of(data).model_copy(update={"time": _BEGAN})


def progress() -> JobProgress:
    """Return a ``progress`` event."""
    data = Progress(task_id=TASK_ID, progress=0.62, stage="render", sequence=7, remaining_s=3.4)
    return JobProgress.of(data, attempt=1, worker_id=WORKER_ID).model_copy(update={"time": _BEGAN})


def completed() -> JobCompleted:
    """Return a ``completed`` event of one song."""
    return JobCompleted.of(
        Completed(
            task_id=TASK_ID,
            attempt=1,
            worker_id=WORKER_ID,
            finished_at=_ENDED,
            model=_MODEL,
            lm=_LM,
            policy=_POLICY,
            audios=(_audio(),),
            request=_EFFECTIVE,
            metas=Metas(bpm=72, duration=600, keyscale="D minor", timesignature="4", language="unknown"),
            audio_codes=((51_023, 7_344, 60_101),),
            timings=Timings(queued=0.4, plan=3.2, render=4.1, encode=0.9, upload=0.3, total=8.6),
        )
    )


def repainted() -> JobCompleted:
    """Return a ``completed`` event of a song that comes from a song, and is the best of two, with times of its lyrics.

    Its shape is that of a real run; tokens but those of one line are left out.
    """
    task_id, because = REPAINT["task_id"], "of song 0 of order-4710"
    measures = {"silence": 0.0, "longest_gap": 0.3, "clipping": 0.0, "loudness_jumps": 1.4, "noise": -31.8}
    taken_over = {
        "prompt": "slow jazz with brushes",
        "lyrics": "[Verse]\nlast train leaves at nine\nrain on the empty square",
        "bpm": 77,
        "key_scale": "D minor",
        "model": "acestep-v15-turbo",
        "audio_format": "flac",
        "timestamps": True,
        "loudness_lufs": -14.0,
    }
    return JobCompleted.of(
        Completed(
            task_id=task_id,
            attempt=1,
            worker_id=WORKER_ID,
            finished_at=_ENDED,
            model=ModelChoice(requested="acestep-v15-turbo", used="acestep-v15-turbo", fallback=False),
            lm=None,
            policy=_POLICY.model_copy(update={"adjustments": ()}),
            audios=(_repaint(task_id),),
            request=GenerationRequest.model_validate({**REPAINT, **taken_over}),
            metas=Metas(bpm=77, duration=12, keyscale="D minor", language="en", caption="slow jazz with brushes"),
            candidates=(
                Candidate(seed=7, score=0.82, kept=False, measures={**measures, "lyrics": 0.51}),
                Candidate(seed=8, score=0.94, kept=True, index=0, measures={**measures, "lyrics": 0.7691}),
            ),
            score_table="acestep-consumer-1",
            timings=Timings(queued=0.1, plan=0.0, render=0.9, encode=0.2, upload=0.1, total=1.3),
            parents=(ParentSong(task_id="order-4710", index=0, field="source_task_id"),),
            edits=tuple(Edit(field=name, value=value, because=because) for name, value in taken_over.items()),
        )
    )


def unfinished(status: Any) -> TerminalEvent:
    """Return the terminal event of a job without songs: ``failed``, ``rejected``, ``cancelled`` or ``expired``."""
    code, message, retryable, details = _ERRORS[status]
    error = ErrorReport(code=code, message=message, retryable=retryable, attempts=1, details=details)
    data = Unfinished(task_id=TASK_ID, status=status, attempt=1, worker_id=WORKER_ID, finished_at=_ENDED, error=error)
    return unfinished_event(data)


def worker() -> WorkerEvent:
    """Return a worker's announcement."""
    data = Worker(
        worker_id=WORKER_ID,
        state="ready",
        prefetch=8,
        models=("acestep-v15-turbo",),
        tier=_POLICY.tier,
        vram_gb=_POLICY.vram_gb,
        in_hand=5,
        seconds_per_job=8.6,
        remaining_s=(0.9, 2.4, 4.1, 6.0, 8.2),
        stages=StageJobs(plan=2, render=2, encode=1),
        stage_limits=StageLimitsReport(plan=64, render=6, encode=8, upload=16),
        lm=_LM,
    )
    return WorkerEvent.of(data).model_copy(update={"time": _BEGAN, "id": "5d3e6a2e-9b1f-5c55-8c0b-6f1f3a0f7c11"})


def events() -> dict[type[CloudEvent], CloudEvent]:
    """Return an example for each event class; every class has one."""
    found: tuple[CloudEvent, ...] = (started(), progress(), completed(), *map(unfinished, type_of_unfinished), worker())
    examples = {type(event): event for event in found}
    return {kind: examples[kind] for kind in (*get_args(JobEvent), WorkerEvent)}


def more_events() -> dict[type[CloudEvent], dict[str, CloudEvent]]:
    """Return further examples of an event class, by a name for each."""
    return {JobCompleted: {"repaint": repainted()}}


def _audio() -> Audio:
    return Audio(
        uri=f"s3://acestep/jobs/{TASK_ID}/0.flac",
        format="flac",
        content_type="audio/flac",
        sample_rate=48_000,
        channels=2,
        duration_s=600.0,
        bytes=68_204_117,
        sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        seed=42,
    )


def _repaint(task_id: str) -> Audio:
    begin = f"s3://acestep/jobs/{task_id}/0"
    words = ("last ", 1.6, 1.92), ("train ", 1.92, 2.36), ("leaves ", 2.36, 2.9), ("at ", 2.9, 3.0), ("nine", 3.0, 3.6)
    tokens = tuple(LyricToken(text=text, start_s=start, end_s=end) for text, start, end in words)
    return Audio(
        uri=f"{begin}.flac",
        format="flac",
        content_type="audio/flac",
        sample_rate=48_000,
        channels=2,
        duration_s=12.0,
        bytes=1_779_399,
        sha256="5d7ae80d7a281b6fd45edceae1d5ee6e4b4ca7434568872848a8db90373ed8a3",
        seed=8,
        files=SongFiles(
            lrc=FileObject(
                uri=f"{begin}.lrc",
                content_type="text/plain; charset=utf-8",
                bytes=131,
                sha256="1965322c6f95a614fb83741b21c9a289b63bc15423aed1bf6fde827a68797e02",
            ),
            vtt=FileObject(
                uri=f"{begin}.vtt",
                content_type="text/vtt; charset=utf-8",
                bytes=164,
                sha256="b21f9f9bcbefebefe3fa13c757212338c9c3124050b915d7721b5086c3f82d0f",
            ),
            latents=FileObject(
                uri=f"{begin}.latents.safetensors",
                content_type="application/octet-stream",
                bytes=38_528,
                sha256="ccfa68c4b23187d8cade0989e842d2d21a5cc5f07929e900bc8c8f6772dcc4c0",
            ),
        ),
        lyrics=(
            LyricLine(text="[Verse]", start_s=0.0, end_s=1.6),
            LyricLine(text="last train leaves at nine", start_s=1.6, end_s=3.6, tokens=tokens),
            LyricLine(text="rain on the empty square", start_s=3.6, end_s=7.2),
        ),
        lyric_score=0.7691,
        loudness=Loudness(lufs=-14.0, true_peak_db=-1.8),
    )
