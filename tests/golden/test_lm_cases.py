# SPDX-License-Identifier: Apache-2.0
"""The language model's calls of each golden case, on the worker's own path from the request's body to the renderer.

A double stands in for the model and gives the answers of the case. Prompts are compared letter for letter, after the
chat template; sampling, guidance, what the grammar fixes and leaves out, and what reaches the renderer by value.

Where this worker departs from the original on purpose, ``DECIDED`` says so and holds our value.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import pytest
import torch
from diffusers import AceStepPipeline

from acestep_consumer.domain.errors import InvalidRequest, LmUnavailable
from acestep_consumer.domain.job import Job, Plan, Sources, TokenizedSource
from acestep_consumer.domain.parse import RequestRules, parse
from acestep_consumer.domain.ports import Renderer
from acestep_consumer.domain.tasks import TASKS, Variant
from acestep_consumer.engine.adapters import LmPlanner, PlannerSupervisor
from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, TextConstraint
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.grammar import SONG_FIELDS, metadata_grammar, song_grammar
from acestep_consumer.engine.planner.metadata import FIELDS, Metadata
from acestep_consumer.engine.planner.planning import SongPlanner
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.renderer.pipeline_arguments import DecodedInputs, PipelineArguments, arguments_for
from acestep_consumer.engine.testing import tiny_lm
from acestep_consumer.policy.admit import admit
from acestep_schemas.events import LmChoice
from tests.support.admission import BASE, TURBO, make_limits

CASES: Final = {path.stem: path for path in sorted((Path(__file__).parent / "cases").glob("lm_*.json"))}
LM: Final = LmChoice(model=tiny_lm.NAME, backend="pt")
SOURCE_S: Final = 33
"""Length of the source audio that stands in for the case's ``x.wav``."""

CODES_BEYOND: Final = 10
"""The original allows so many tokens more than codes; here the count is exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A deliberate departure: why, and what the grammar fixes here."""

    why: str
    fixed_metadata: Mapping[str, Any]


DECIDED: Final[Mapping[str, Decided]] = MappingProxyType(
    {"lm_thinking_unicode": Decided(why="a given vocal_language stays", fixed_metadata={"language": "ja"})}
)


_SKIPPED: Final = {"caption": "skip_caption", "language": "skip_language", "genres": "skip_genres"}


class AnsweringModel:
    """Stands in for the engine loop: records generations, and answers them in order."""

    def __init__(self, tokens: LmTokens, answers: Sequence[str]) -> None:
        self._tokens = tokens
        self._answers = list(answers)
        self.generations: list[Generation] = []

    async def generate(self, generation: Generation, _: Callable[[int], None] = lambda _: None) -> tuple[int, ...]:
        """Return the tokens of the case's next answer."""
        self.generations.append(generation)
        return tuple(self._tokens.tokenizer.encode(self._answers.pop(0), add_special_tokens=False))

    def prompt_of(self, tokens: tuple[int, ...]) -> str:
        """Return a prompt as text."""
        return str(self._tokens.tokenizer.decode(tokens, skip_special_tokens=False))


class Engines:
    """Stands in for the engine processes: plans in this process, and has the codes of the source."""

    def __init__(self, planner: SongPlanner, codes: str) -> None:
        self._planner = planner
        self._codes = codes

    async def plan_songs(self, job: Job, source: TokenizedSource | None, report: Callable[[float, str], None]) -> Plan:
        """Plan the songs as the planner's process does."""
        return await self._planner.plan(job, source, report)

    async def tokenize_audio(self, _job: Job, _sources: Sources) -> TokenizedSource:
        """Return the case's audio codes."""
        return TokenizedSource(codes=self._codes, source_s=SOURCE_S)


@dataclass(frozen=True, slots=True)
class Planned:
    """A planned case: the job, its plan, and the model that was asked."""

    job: Job
    plan: Plan
    model: AnsweringModel


def read(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads(CASES[name].read_text(encoding="utf-8"))
    return case


def job_of(case: Mapping[str, Any]) -> Job:
    """Admit the case's body. Local paths are refused by the worker: the source is an object in S3."""
    body = dict(case["body"])
    if "src_audio_path" in body:
        body["src_audio_path"] = "s3://bucket/x.wav"
    request = parse(json.dumps(body).encode(), case["name"], RequestRules(max_bytes=1 << 20))
    base_only = TASKS[request.body.task_type].variants == {Variant.BASE}
    limits = make_limits(80, (BASE,) if base_only else (TURBO,))
    return admit(request, limits if "language_model" in case else replace(limits, lm=LM))


async def planned(case: Mapping[str, Any], tokens: LmTokens) -> Planned:
    job = job_of(case)
    answers = [each for call in case["calls"] for each in _listed(call["answer"])]
    model = AnsweringModel(tokens, answers)
    planner = SongPlanner(cast("EngineLoop", model), tokens)
    engines = Engines(planner, (case["result"] or {}).get("audio_codes", ""))
    ports = cast("PlannerSupervisor", engines), cast("Renderer", engines)
    return Planned(job, await LmPlanner(*ports).plan(job, Sources(), lambda *_: None), model)


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def tokens() -> LmTokens:
    """The tiny model's tokenizer; its chat template is laid out like Qwen3's."""
    return LmTokens(tiny_lm.make_tokenizer())


def sings_or_describes(name: str) -> bool:
    return "error" not in read(name)


PLANNED: Final = [name for name in CASES if sings_or_describes(name)]


def test_all_cases_are_here() -> None:
    assert len(CASES) == 29
    assert set(DECIDED) <= set(CASES)


@pytest.mark.parametrize("name", PLANNED)
async def test_the_model_is_asked_as_by_the_original(name: str, tokens: LmTokens) -> None:
    case = read(name)
    model = (await planned(case, tokens)).model
    calls = [call for call in case["calls"] for _ in _listed(call["answer"])]
    assert len(model.generations) == len(calls)
    for generation, call in zip(model.generations, calls, strict=True):
        assert model.prompt_of(generation.prompt) == call["conditional"]
        scale = generation.sampling.cfg_scale
        assert scale == call["cfg_scale"]
        unconditional = model.prompt_of(generation.unconditional or ()) if scale > 1 else None
        assert unconditional == call["unconditional"]


@pytest.mark.parametrize("name", PLANNED)
async def test_it_samples_as_the_original_and_is_held_to_the_same_form(name: str, tokens: LmTokens) -> None:
    case = read(name)
    found = await planned(case, tokens)
    calls = [call for call in case["calls"] for _ in _listed(call["answer"])]
    for generation, call in zip(found.model.generations, calls, strict=True):
        sampling = generation.sampling
        assert sampling.temperature == call["temperature"]
        assert (sampling.top_k or None) == call["top_k"]
        assert sampling.top_p == (call["top_p"] or 1)
        assert sampling.repetition_penalty == call["repetition_penalty"]
        if call["phase"] == "codes":
            assert generation.constraint == CodeConstraint(call["max_new_tokens"] - CODES_BEYOND)
        else:
            assert isinstance(generation.constraint, TextConstraint)
            assert generation.constraint.grammar == grammar_of(name, call, found.job.policy.limits.max_duration_s)


def grammar_of(name: str, call: Mapping[str, Any], max_duration_s: int) -> str:
    """The grammar that fixes and leaves out what the original does."""
    skipped = {each for each, flag in _SKIPPED.items() if call[flag]}
    decided = DECIDED.get(name)
    fixed = dict(decided.fixed_metadata if decided else call["fixed_metadata"] or {})
    known = Metadata(**{key: value for key, value in fixed.items() if key not in skipped})
    write, fields = (metadata_grammar, FIELDS) if call["phase"] == "cot" else (song_grammar, SONG_FIELDS)
    return write(known, fields=[each for each in fields if each not in skipped], max_duration_s=max_duration_s)


@pytest.mark.parametrize("name", [name for name in PLANNED if read(name)["reaches_renderer"]])
async def test_the_same_values_reach_the_renderer(name: str, tokens: LmTokens) -> None:
    case = read(name)
    found = await planned(case, tokens)
    wanted = case["reaches_renderer"]
    assert list(found.plan.audio_codes) == [codes for codes in _listed(wanted["audio_code_string"]) if codes]
    arguments = arguments_of(found)
    assert arguments.prompt == wanted["captions"]
    assert arguments.lyrics == wanted["lyrics"]
    assert arguments.bpm == wanted["bpm"]
    assert (arguments.keyscale or "") == wanted["key_scale"]
    assert (arguments.timesignature or "") == wanted["time_signature"]
    assert arguments.vocal_language == wanted["vocal_language"]
    assert arguments.audio_duration == wanted["audio_duration"]
    assert arguments.seeds == tuple(int(seed) for seed in wanted["seed"].split(","))
    assert len(arguments.seeds) == wanted["batch_size"]
    assert arguments.task_type == wanted["task_type"]
    assert instruction_of(arguments) == wanted["instruction"]


def arguments_of(found: Planned) -> PipelineArguments:
    """The renderer's own reading of job and plan. The answers' few codes would decide the length: they are left out."""
    source = torch.zeros(2, SOURCE_S * 48_000) if found.job.request.src_audio_path else None
    model = BASE if found.job.model.used == BASE.name else TURBO
    return arguments_for(found.job, replace(found.plan, audio_codes=()), model, DecodedInputs(source))


def instruction_of(arguments: PipelineArguments) -> str:
    task = AceStepPipeline._get_task_instruction(
        arguments.model_task, arguments.track_name, list(arguments.track_classes)
    )
    return arguments.instruction or str(task)


@pytest.mark.parametrize("name", [name for name in PLANNED if read(name)["result"] and read(name)["calls"]])
async def test_an_analysis_reports_what_the_model_found(name: str, tokens: LmTokens) -> None:
    case = read(name)
    metas = (await planned(case, tokens)).plan.metas
    wanted = case["result"]["metas"]
    for key in ("bpm", "caption", "duration", "keyscale", "language", "timesignature"):
        assert getattr(metas, key) == wanted[key]
    assert metas.lyrics == case["result"]["lyrics"]


def test_a_song_that_needs_the_model_is_refused_without_one() -> None:
    with pytest.raises(LmUnavailable):
        job_of(read("lm_thinking_without_model"))


async def test_codes_of_the_source_are_the_answer_without_the_model(tokens: LmTokens) -> None:
    case = read("lm_extract_codes_only")
    found = await planned(case, tokens)
    assert found.job.analysis
    assert found.plan.audio_codes == (case["result"]["audio_codes"],)


def test_codes_of_a_source_need_one() -> None:
    with pytest.raises(InvalidRequest, match="src_audio_path"):
        job_of(read("lm_extract_codes_only_no_source"))
