# SPDX-License-Identifier: Apache-2.0
"""Planning without a language model: the request's own values are the plan."""

from acestep_consumer.domain.job import Job, Plan, Sources
from acestep_consumer.domain.ports import Report
from acestep_schemas.events import Metas

DEFAULT_DURATION_S = 60.0
"""Duration when neither the request nor source audio nor audio codes determine it; the pipeline's own default."""


class DirectPlanner:
    """Implements the ``Planner`` port. Admission has already refused requests that need the language model."""

    async def plan(self, job: Job, sources: Sources, report: Report) -> Plan:  # noqa: ARG002 - the port's shape
        """Return the request's own metadata and codes. Never waits."""
        request = job.request
        metas = Metas(
            bpm=request.bpm,
            duration=_duration(job),
            keyscale=request.key_scale or "",
            timesignature=request.time_signature or "",
            language=request.vocal_language,
            caption=request.prompt,
            lyrics=request.lyrics,
        )
        codes = (request.audio_code_string,) if request.audio_code_string else ()
        return Plan(metas=metas, audio_codes=codes)


def _duration(job: Job) -> float | None:
    """Return seconds; None when source audio or audio codes determine the duration."""
    request = job.request
    if request.audio_duration is not None or request.src_audio_path or request.audio_code_string:
        return request.audio_duration
    return min(DEFAULT_DURATION_S, job.policy.limits.max_duration_s)
