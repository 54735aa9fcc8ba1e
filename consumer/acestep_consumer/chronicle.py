# SPDX-License-Identifier: Apache-2.0
"""Follows every job from start to end: for those who count, for its trace, and to learn how long jobs take."""

import structlog

from acestep_consumer.case import Case
from acestep_consumer.ending import Ending
from acestep_consumer.eta import CostModel, Estimate
from acestep_consumer.job import Job
from acestep_consumer.tally import JobTally
from acestep_consumer.tracing import note_end
from acestep_schemas.events import Completed

log = structlog.get_logger()


class Chronicle:
    """Sees the jobs of one worker.

    Args:
        tally: counts them.
        costs: learns what they take.
    """

    def __init__(self, tally: JobTally, costs: CostModel) -> None:
        self._tally = tally
        self._costs = costs

    def begins(self, case: Case, job: Job) -> Estimate:
        """Take note that a job begins; return what it will probably take."""
        case.job, case.estimate = job, self._costs.expect(job)
        return case.estimate

    def ended(self, case: Case, ending: Ending) -> None:
        """Take note of an end that has been told."""
        if case.answer is not None:
            self._tally.event_repeated()
            log.info("job was done before, told again")
            return
        note_end(ending)
        expected_s = case.estimate.expected_s if case.estimate else None
        self._tally.job_ended(ending, case.job, redelivered=case.delivery.redelivered, expected_s=expected_s)
        if not isinstance(ending, Completed):
            return  # why there are no songs, the witness has said
        total_s = ending.timings.total
        log.info("job done", songs=len(ending.audios), total_s=total_s, attempt=ending.attempt)
        if case.job and total_s is not None:
            self._costs.learn(case.job, _music_s(ending), total_s)


def _music_s(ending: Completed) -> float:
    """Seconds of music that were made, all songs together."""
    planned = ending.request.audio_duration
    return sum(audio.duration_s if planned is None else planned for audio in ending.audios)
