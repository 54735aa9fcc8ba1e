# SPDX-License-Identifier: Apache-2.0
"""Planning of one job with the language model, in the phases of ACE-Step 1.5.

First the texts: a whole song from a description (sample mode), better texts (format), or texts for source audio
(understand). Or else metadata, if any is missing. Then audio codes for each song, if the job thinks. Values that the
request gives are fixed in the metadata phase and in format: the grammar leaves the model no choice there. In sample
mode and understand the model writes all of them but the language, as in ACE-Step's own server.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND, parse_codes
from acestep_consumer.domain.errors import PlanFailed
from acestep_consumer.domain.job import Job, Plan, TokenizedSource
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.planner import prompts
from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, Sampling, TextConstraint
from acestep_consumer.engine.planner.description_hints import hints_in
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.grammar import SONG_FIELDS, metadata_grammar, song_grammar
from acestep_consumer.engine.planner.metadata import FIELDS, Metadata, MetadataError, as_given, parse, tempo_as_given
from acestep_consumer.engine.planner.prompts import GuidedPrompts, Prompt
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.policy.tiers import DEFAULT_DURATION_S, MAX_DURATION_S, MIN_DURATION_S
from acestep_schemas.events import Metas
from acestep_schemas.request import GenerationRequest

METADATA_TOKENS, SONG_TOKENS = 1024, 2560
"""Limits of the two kinds of text. The DiT reads 2,048 tokens of lyrics: longer ones would be truncated there."""

WARM_UP_SONGS = (1, 2, 5)
"""Batch sizes: one is compiled by itself; the second and third let the compiler make the size symbolic."""

TEXT_SHARE = 0.1
"""Share of the planning stage's progress: texts are a few hundred tokens, the codes of a song 1,500."""

_ALWAYS_CONSTRAINED = "constrained_decoding = false has no effect: metadata is always held to its grammar"
_NO_PENALTY = "has no effect: as in ACE-Step's own server, the language model samples without a penalty"

_SCORE = ("bpm", "duration", "keyscale", "timesignature")
_UNDERSTANDING_TEMPERATURE = 0.3


@dataclass(frozen=True, slots=True)
class PlanDraft:
    """An unfinished plan. ``caption`` is the one in the prompts; the model's own is in ``metadata``.

    ``thoughts`` are those of the metadata phase. Where it did not run, the model's thoughts before audio codes are the
    four values of ``metadata`` that a score has: tempo, duration, key and time signature. ``written_lyrics`` are the
    model's own, whether they are used or not.
    """

    caption: str
    lyrics: str
    metadata: Metadata
    thoughts: Metadata | None = None
    written_lyrics: str = ""
    warnings: tuple[str, ...] = ()


class SongPlanner:
    """Plans jobs on one engine loop; one call per job, any number at a time."""

    def __init__(self, engine_loop: EngineLoop, tokens: LmTokens) -> None:
        self._engine_loop = engine_loop
        self._tokens = tokens

    async def warm_up(self) -> None:
        """Do once what is slow the first time: compile a grammar of each kind, and sampling for a few batch sizes."""
        prompt = self._tokens.encode(prompts.rewrite("", ""))

        async def generate(constraint: CodeConstraint | TextConstraint) -> None:
            await self._engine_loop.generate(_warm_up_generation(prompt, constraint))

        for grammar in (metadata_grammar(), song_grammar()):
            await generate(TextConstraint(grammar, max_tokens=1, truncate=True))
        for songs in WARM_UP_SONGS:
            await asyncio.gather(*(generate(CodeConstraint(2)) for _ in range(songs)))

    async def plan(self, job: Job, source: TokenizedSource | None, report: Report) -> Plan:
        """Return the plan of one job; ``source`` is its tokenized source audio, for analysis. Raises ``PlanFailed``."""
        request = job.request
        draft = draft_of(job)
        if source is not None:
            return _plan(job, await self._understand(job, draft, source))
        if request.sample_mode or request.sample_query:
            draft = await self._create_sample(job, draft)
        elif request.use_format:
            draft = await self._format(job, draft)
        elif needs_metadata(job, draft):
            draft = await self._plan_metadata(job, draft)
        report(TEXT_SHARE, "plan")
        if job.analysis or not request.thinking or request.audio_code_string:
            return _plan(job, draft, _requested_codes(request))
        return _plan(job, draft, await self._generate_codes(job, draft, report))

    async def _understand(self, job: Job, draft: PlanDraft, source: TokenizedSource) -> PlanDraft:
        """Describe source audio: caption, lyrics and metadata."""
        prompt = prompts.understand(parse_codes(source.codes))
        fixed = Metadata(language=draft.metadata.language)
        sampling = _understanding(job, sampling_of(job.request, job.seeds[0], guided=False))
        draft = _without_given(draft, job.request, "the source audio is described as it is")
        return _merged(draft, await self._plan_song(job, prompt, fixed, sampling=sampling), request=None)

    async def _create_sample(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Make a whole song from a description."""
        request = job.request
        query = request.sample_query or request.prompt
        hints = hints_in(query)
        instrumental = request.is_instrumental if job.given & {"lyrics", "instrumental"} else hints.instrumental
        prompt = prompts.sample(query, instrumental=instrumental)
        fixed = Metadata(language=draft.metadata.language or hints.language)
        draft = _without_given(draft, request, "in sample mode the language model decides it")
        return _merged(draft, await self._plan_song(job, prompt, fixed), request)

    async def _format(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Improve the caption and the lyrics. Their language is the request's, so the model names none."""
        prompt = prompts.rewrite(draft.caption, draft.lyrics)
        fields = [field for field in SONG_FIELDS if field != "language"]
        return _merged(draft, await self._plan_song(job, prompt, draft.metadata, fields), request=None)

    async def _plan_metadata(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Fill in missing metadata."""
        fixed = replace(draft.metadata, caption=None)
        grammar = metadata_grammar(fixed, fields=_fields(job.request), max_duration_s=job.policy.limits.max_duration_s)
        prompt = prompts.metadata_phase(draft.caption, draft.lyrics)
        text = await self._generate_text(job, prompt, TextConstraint(grammar, METADATA_TOKENS))
        metadata = _parsed(text, fixed)
        return replace(draft, metadata=metadata, thoughts=metadata)

    async def _plan_song(
        self,
        job: Job,
        prompt: Prompt,
        fixed: Metadata,
        fields: Collection[str] = SONG_FIELDS,
        sampling: Sampling | None = None,
    ) -> Metadata:
        """Generate metadata and lyrics."""
        grammar = song_grammar(
            replace(fixed, caption=None), fields=fields, max_duration_s=job.policy.limits.max_duration_s
        )
        constraint = TextConstraint(grammar, SONG_TOKENS, truncate=True)
        return _parsed(await self._generate_text(job, prompt, constraint, sampling), fixed)

    async def _generate_text(
        self, job: Job, prompt: Prompt, constraint: TextConstraint, sampling: Sampling | None = None
    ) -> str:
        """Generate text, without guidance."""
        generation = Generation(
            prompt=self._tokens.encode(prompt),
            unconditional=None,
            constraint=constraint,
            sampling=sampling or sampling_of(job.request, job.seeds[0], guided=False),
            rank=job.rank,
        )
        return self._tokens.decode(await self._engine_loop.generate(generation))

    async def _generate_codes(self, job: Job, draft: PlanDraft, report: Report) -> tuple[str, ...]:
        """Generate the audio codes of every song, together or one after the other."""
        seconds = _duration_s(job.request, draft.metadata)
        if seconds is None and not job.request.use_cot_metas:
            seconds = min(DEFAULT_DURATION_S, job.policy.limits.max_duration_s)
        if seconds is None:
            raise PlanFailed("no duration was given or planned, so that the number of audio codes is unknown")
        count = int(CODES_PER_SECOND * min(max(seconds, MIN_DURATION_S), MAX_DURATION_S))
        thoughts = draft.thoughts or replace(draft.metadata, caption=None, language=None)
        guided = prompts.codes_phase(draft.caption, draft.lyrics, thoughts, job.request.lm_negative_prompt)
        callbacks = _progress_callbacks(len(job.seeds), count, report)
        songs = [
            self._generate_song_codes(job, guided, count, seed, on_progress)
            for seed, on_progress in zip(job.seeds, callbacks, strict=True)
        ]
        if job.request.allow_lm_batch:
            return tuple(await asyncio.gather(*songs))
        return tuple([await song for song in songs])

    async def _generate_song_codes(
        self, job: Job, guided: GuidedPrompts, count: int, seed: int, on_progress: Callable[[int], None]
    ) -> str:
        generation = Generation(
            prompt=self._tokens.encode(guided.conditional),
            unconditional=self._tokens.encode(guided.unconditional),
            constraint=CodeConstraint(count),
            sampling=sampling_of(job.request, seed, guided=True),
            rank=job.rank,
        )
        return self._tokens.code_text(await self._engine_loop.generate(generation, on_progress))


def _warm_up_generation(prompt: tuple[int, ...], constraint: CodeConstraint | TextConstraint) -> Generation:
    """Return a generation with a request's default guidance and sampling."""
    sampling = sampling_of(GenerationRequest(), 0, guided=True)
    return Generation(prompt=prompt, unconditional=prompt, constraint=constraint, sampling=sampling)


def draft_of(job: Job) -> PlanDraft:
    """Return the draft of the request's own values; fields that the producer did not set are left open."""
    request = job.request
    seconds = request.audio_duration
    return PlanDraft(
        caption=request.prompt,
        lyrics=request.lyrics,
        metadata=Metadata(
            bpm=tempo_as_given(request.bpm),
            duration=None if seconds is None else _whole_seconds(seconds),
            keyscale=as_given("keyscale", request.key_scale),
            language=as_given("language", request.vocal_language) if "vocal_language" in job.given else None,
            timesignature=as_given("timesignature", request.time_signature),
        ),
        warnings=tuple(_without_effect(request)),
    )


def _without_effect(request: GenerationRequest) -> Iterator[str]:
    """Yield a warning for each requested value that has no effect."""
    if not request.constrained_decoding:
        yield _ALWAYS_CONSTRAINED
    if request.lm_repetition_penalty != 1:
        yield f"lm_repetition_penalty = {request.lm_repetition_penalty:g} {_NO_PENALTY}"


def _without_given(draft: PlanDraft, request: GenerationRequest, why: str) -> PlanDraft:
    """Return the draft with a warning for each value of a score that the request gives, and that is not used."""
    duration = None if request.audio_duration is None else f"{request.audio_duration:g}"
    given = {
        "bpm": request.bpm,
        "key_scale": request.key_scale,
        "time_signature": request.time_signature,
        "audio_duration": duration,
    }
    unused = [f"{name} = {value} was not used: {why}" for name, value in given.items() if value]
    return replace(draft, warnings=(*draft.warnings, *unused))


def needs_metadata(job: Job, draft: PlanDraft) -> bool:
    """Whether the metadata phase runs: for an analysis, and where the model may write a missing value of the score."""
    incomplete = any(getattr(draft.metadata, field) is None for field in _SCORE)
    return job.request.analysis_only or (job.request.use_cot_metas and incomplete)


def sampling_of(request: GenerationRequest, seed: int, *, guided: bool) -> Sampling:
    """Return the sampling parameters of the request's ``lm_`` fields. A guidance scale below 1 is none."""
    return Sampling(
        seed=seed,
        temperature=request.lm_temperature,
        cfg_scale=max(request.lm_cfg_scale, 1.0) if guided else 1.0,
        top_k=request.lm_top_k,
        top_p=request.lm_top_p,
    )


def _understanding(job: Job, sampling: Sampling) -> Sampling:
    """Return the sampling for a description of audio: nearly greedy, unless the request says otherwise."""
    temperature = sampling.temperature if "lm_temperature" in job.given else _UNDERSTANDING_TEMPERATURE
    return replace(sampling, temperature=temperature, top_p=sampling.top_p if "lm_top_p" in job.given else 1.0)


def _fields(request: GenerationRequest) -> Collection[str]:
    """Return the metadata fields to generate: caption and language can be switched off."""
    off = {
        name for name, on in (("caption", request.use_cot_caption), ("language", request.use_cot_language)) if not on
    }
    return [field for field in FIELDS if field not in off]


def _may_rewrite_caption(request: GenerationRequest) -> bool:
    return request.use_cot_caption and not request.is_format_caption


def _merged(draft: PlanDraft, found: Metadata, request: GenerationRequest | None) -> PlanDraft:
    """Return the draft with the generated values, but with the lyrics of ``request`` if it has any."""
    keeps_lyrics = request is not None and bool(request.lyrics.strip())
    lyrics = draft.lyrics if keeps_lyrics else (found.lyrics or draft.lyrics)
    return replace(
        draft,
        caption=found.caption or draft.caption,
        lyrics=lyrics,
        metadata=replace(found, lyrics=None),
        written_lyrics=found.lyrics or "",
    )


def _plan(job: Job, draft: PlanDraft, codes: tuple[str, ...] = ()) -> Plan:
    metadata, request = draft.metadata, job.request
    metas = Metas(
        bpm=metadata.bpm or request.bpm,
        duration=_duration_s(request, metadata),
        keyscale=str(metadata.keyscale or ""),
        timesignature=str(metadata.timesignature or ""),
        # A song's language is the request's, as in ACE-Step's own server; the model's is for its own thoughts.
        language=(job.analysis and metadata.language) or request.vocal_language,
        caption=(_may_rewrite_caption(request) and metadata.caption) or draft.caption,
        lyrics=draft.lyrics,
        genres=metadata.genres or "",
        cot_caption=metadata.caption or "",
        cot_lyrics=draft.written_lyrics,
    )
    return Plan(metas=metas, audio_codes=codes, warnings=draft.warnings)


def _requested_codes(request: GenerationRequest) -> tuple[str, ...]:
    return (request.audio_code_string,) if request.audio_code_string else ()


def _parsed(text: str, fixed: Metadata) -> Metadata:
    try:
        return parse(text, fixed)
    except MetadataError as error:
        raise PlanFailed(f"the language model's metadata is invalid: {error}") from error


def _duration_s(request: GenerationRequest, metadata: Metadata) -> float | None:
    """Return the seconds of the song: the metadata's, with the request's fraction of a second where it has one."""
    given = request.audio_duration
    if given is not None and metadata.duration in (None, _whole_seconds(given)):
        return given
    return metadata.duration


def _whole_seconds(seconds: float) -> int:
    return min(max(int(seconds), MIN_DURATION_S), MAX_DURATION_S)


def _progress_callbacks(songs: int, count: int, report: Report) -> list[Callable[[int], None]]:
    """Return a callback for each song, which reports the share of all songs' codes that are generated."""
    generated = [0] * songs

    def callback_for(song: int) -> Callable[[int], None]:
        def on_progress(so_far: int) -> None:
            generated[song] = so_far
            report(TEXT_SHARE + (1 - TEXT_SHARE) * sum(generated) / (songs * count), "plan")

        return on_progress

    return [callback_for(song) for song in range(songs)]
