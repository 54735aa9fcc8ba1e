# SPDX-License-Identifier: Apache-2.0
"""Planning of one job with the language model, in the phases of ACE-Step 1.5.

First the texts: a whole song from a description (sample mode), better texts (format), or texts for source audio
(understand). Then metadata, if any is missing. Then audio codes for each song, if the job thinks. Values that the
request gives are fixed in every phase: the grammar leaves the model no choice there.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND, parse_codes
from acestep_consumer.domain.errors import PlanFailed
from acestep_consumer.domain.job import Job, Plan, TokenizedSource
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.planner import prompts
from acestep_consumer.engine.planner.backend import CodeConstraint, Generation, Sampling, TextConstraint
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.grammar import metadata_grammar, song_grammar
from acestep_consumer.engine.planner.metadata import FIELDS, Metadata, MetadataError, parse
from acestep_consumer.engine.planner.prompts import GuidedPrompts, Prompt
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.policy.tiers import MAX_DURATION_S, MIN_DURATION_S
from acestep_schemas.events import Metas
from acestep_schemas.request import GenerationRequest

METADATA_TOKENS, SONG_TOKENS = 1024, 2560
"""Limits of the two kinds of text. The DiT reads 2,048 tokens of lyrics: longer ones would be truncated there."""

LEAST_CODES = 10
"""As in ACE-Step, the model writes no fewer codes for a song."""

WARM_UP_SONGS = (1, 2, 5)
"""Batch sizes: one is compiled by itself; the second and third let the compiler make the size symbolic."""

TEXT_SHARE = 0.1
"""Share of the planning stage's progress: texts are a few hundred tokens, the codes of a song 1,500."""

_ALWAYS_CONSTRAINED = "constrained_decoding = false has no effect: metadata is always held to its grammar"


@dataclass(frozen=True, slots=True)
class PlanDraft:
    """An unfinished plan. ``caption`` is the one in the prompts; the model's own is in ``metadata``."""

    caption: str
    lyrics: str
    metadata: Metadata
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
            draft = await self._understand(job, draft, source)
            return _plan(job, draft)
        if request.sample_mode or request.sample_query:
            draft = await self._create_sample(job, draft)
        elif request.use_format:
            draft = await self._format(job, draft)
        report(TEXT_SHARE / 2, "plan")
        if needs_metadata(job, draft):
            draft = await self._plan_metadata(job, draft)
        report(TEXT_SHARE, "plan")
        if job.analysis or not request.thinking or request.audio_code_string:
            return _plan(job, draft, _requested_codes(request))
        return _plan(job, draft, await self._generate_codes(job, draft, report))

    async def _understand(self, job: Job, draft: PlanDraft, source: TokenizedSource) -> PlanDraft:
        """Describe source audio: caption, lyrics and metadata."""
        prompt = prompts.understand(parse_codes(source.codes))
        fixed = replace(draft.metadata, duration=_whole_seconds(source.source_s))
        return _merged(draft, await self._plan_song(job, prompt, fixed), request=None)

    async def _create_sample(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Make a whole song from a description."""
        request = job.request
        query = request.sample_query or request.prompt
        instrumental = "lyrics" in job.given and request.instrumental
        prompt = prompts.sample(query, instrumental=instrumental)
        return _merged(draft, await self._plan_song(job, prompt, draft.metadata), request)

    async def _format(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Improve the caption and the lyrics."""
        prompt = prompts.rewrite(draft.caption, draft.lyrics)
        return _merged(draft, await self._plan_song(job, prompt, draft.metadata), request=None)

    async def _plan_metadata(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Fill in missing metadata."""
        request = job.request
        fields = _fields(request)
        fixed = replace(draft.metadata, caption=None)
        grammar = metadata_grammar(fixed, fields=fields, max_duration_s=job.policy.limits.max_duration_s)
        guided = prompts.metadata_phase(draft.caption, draft.lyrics, request.lm_negative_prompt)
        metadata = _parsed(await self._generate_text(job, guided, grammar, METADATA_TOKENS))
        return replace(draft, metadata=metadata)

    async def _plan_song(self, job: Job, prompt: Prompt, fixed: Metadata) -> Metadata:
        """Generate metadata and lyrics, without guidance."""
        grammar = song_grammar(replace(fixed, caption=None), max_duration_s=job.policy.limits.max_duration_s)
        return _parsed(await self._generate_text(job, prompt, grammar, SONG_TOKENS))

    async def _generate_text(self, job: Job, prompt: Prompt | GuidedPrompts, grammar: str, max_tokens: int) -> str:
        unconditional = prompt.unconditional if isinstance(prompt, GuidedPrompts) else None
        guided = unconditional is not None
        generation = Generation(
            prompt=self._tokens.encode(prompt.conditional if isinstance(prompt, GuidedPrompts) else prompt),
            unconditional=self._tokens.encode(unconditional) if unconditional else None,
            constraint=TextConstraint(grammar, max_tokens, truncate=not guided),
            sampling=sampling_of(job.request, job.seeds[0], guided=guided),
        )
        return self._tokens.decode(await self._engine_loop.generate(generation))

    async def _generate_codes(self, job: Job, draft: PlanDraft, report: Report) -> tuple[str, ...]:
        """Generate the audio codes of every song, together or one after the other."""
        duration = draft.metadata.duration or job.request.audio_duration
        if duration is None:
            raise PlanFailed("no duration was given or planned, so that the number of audio codes is unknown")
        seconds = job.request.audio_duration or duration
        count = max(int(CODES_PER_SECOND * seconds), LEAST_CODES)
        guided = prompts.codes_phase(draft.caption, draft.lyrics, draft.metadata, job.request.lm_negative_prompt)
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
            bpm=request.bpm,
            duration=None if seconds is None else _whole_seconds(seconds),
            keyscale=request.key_scale,
            language=request.vocal_language if "vocal_language" in job.given else None,
            timesignature=request.time_signature,
        ),
        warnings=() if request.constrained_decoding else (_ALWAYS_CONSTRAINED,),
    )


def needs_metadata(job: Job, draft: PlanDraft) -> bool:
    """Whether the metadata phase runs: always before audio codes, which need complete thoughts."""
    request = job.request
    missing = any(getattr(draft.metadata, field) is None for field in ("bpm", "duration", "keyscale", "timesignature"))
    return request.thinking or request.analysis_only or missing


def sampling_of(request: GenerationRequest, seed: int, *, guided: bool) -> Sampling:
    """Return the sampling parameters of the request's ``lm_`` fields."""
    return Sampling(
        seed=seed,
        temperature=request.lm_temperature,
        cfg_scale=request.lm_cfg_scale if guided else 1.0,
        top_k=request.lm_top_k,
        top_p=request.lm_top_p,
        repetition_penalty=request.lm_repetition_penalty,
    )


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
    return replace(draft, caption=found.caption or draft.caption, lyrics=lyrics, metadata=replace(found, lyrics=None))


def _plan(job: Job, draft: PlanDraft, codes: tuple[str, ...] = ()) -> Plan:
    metadata, request = draft.metadata, job.request
    planned = request.audio_duration if request.audio_duration is not None else metadata.duration
    metas = Metas(
        bpm=metadata.bpm or request.bpm,
        duration=planned,
        keyscale=metadata.keyscale or "",
        timesignature=metadata.timesignature or "",
        language=metadata.language or request.vocal_language,
        caption=(_may_rewrite_caption(request) and metadata.caption) or draft.caption,
        lyrics=draft.lyrics,
    )
    return Plan(metas=metas, audio_codes=codes, warnings=draft.warnings)


def _requested_codes(request: GenerationRequest) -> tuple[str, ...]:
    return (request.audio_code_string,) if request.audio_code_string else ()


def _parsed(text: str) -> Metadata:
    try:
        return parse(text)
    except MetadataError as error:
        raise PlanFailed(f"the language model's metadata is invalid: {error}") from error


def _whole_seconds(seconds: float) -> int:
    return min(max(round(seconds), MIN_DURATION_S), MAX_DURATION_S)


def _progress_callbacks(songs: int, count: int, report: Report) -> list[Callable[[int], None]]:
    """Return a callback for each song, which reports the share of all songs' codes that are generated."""
    generated = [0] * songs

    def callback_for(song: int) -> Callable[[int], None]:
        def on_progress(so_far: int) -> None:
            generated[song] = so_far
            report(TEXT_SHARE + (1 - TEXT_SHARE) * sum(generated) / (songs * count), "plan")

        return on_progress

    return [callback_for(song) for song in range(songs)]
