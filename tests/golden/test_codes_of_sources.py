# SPDX-License-Identifier: Apache-2.0
"""Audio codes of source audio against those of the original ACE-Step 1.5."""

from pathlib import Path

import pytest

from acestep_consumer.domain.audio_codes import parse_codes
from acestep_consumer.domain.job import Job, Plan, Rendering, Sources, TokenizedSource
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.adapters import DirectPlanner
from acestep_consumer.engine.messages import TokenizeAudio
from acestep_consumer.engine.renderer.render import tokenize_audio
from acestep_consumer.engine.renderer.render_resources import RenderResources
from tests.golden.golden_data import GoldenCase, cases
from tests.golden.golden_worker import GoldenWorker, admitted, shared_inputs, sources_of


class LocalRenderer:
    """Reads source audio in this process, and renders nothing."""

    def __init__(self, resources: RenderResources) -> None:
        self._resources = resources

    async def render(self, job: Job, plan: Plan, sources: Sources, folder: Path, report: Report) -> Rendering:
        raise AssertionError("no song is asked for")

    async def tokenize_audio(self, job: Job, sources: Sources) -> TokenizedSource:
        message = TokenizeAudio(request_id=1, job=job, sources=sources)
        with shared_inputs():
            return tokenize_audio(self._resources, message, lambda: False)


CASES = cases(lambda kind: kind == "extract-codes")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
async def test_the_codes_of_source_audio_equal_the_originals(case: GoldenCase, worker: GoldenWorker) -> None:
    resources = worker.resources(case.model)
    job = admitted(case, resources)
    assert (job.lm, job.analysis) == (None, True)
    plan = await DirectPlanner(LocalRenderer(resources)).plan(job, sources_of(case), lambda *_: None)
    (codes,) = plan.audio_codes
    assert codes == case.facts["audio_codes"]
    assert list(parse_codes(codes)) == case.facts["codes"]


def test_there_are_cases_of_three_models() -> None:
    assert len({case.model for case in CASES}) == 3
