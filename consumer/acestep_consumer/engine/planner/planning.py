# SPDX-License-Identifier: Apache-2.0
"""What the language model does for one job, phase by phase, as ACE-Step 1.5 has them.

First the words: a whole song from a description (sample mode), better words (format), or words for a song that was
heard (analysis). Then metadata, when something is missing. Then audio codes, per song, when the job thinks. What the
request gives is fixed in every phase: the grammar leaves the model no choice there.
"""

import asyncio
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from acestep_consumer.domain.errors import PlanFailed
from acestep_consumer.domain.job import Job, Plan, TokenizedSource
from acestep_consumer.domain.ports import Report
from acestep_consumer.engine.planner import prompts
from acestep_consumer.engine.planner.backend import Codes, Generation, Sampling, Text
from acestep_consumer.engine.planner.engine_loop import EngineLoop
from acestep_consumer.engine.planner.grammar import metadata_grammar, song_grammar
from acestep_consumer.engine.planner.metadata import FIELDS, Metadata, MetadataError, parse
from acestep_consumer.engine.planner.prompts import GuidedPrompts, Prompt
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.policy.tiers import MAX_DURATION_S, MIN_DURATION_S
from acestep_schemas.events import Metas
from acestep_schemas.request import GenerationRequest

CODES_PER_SECOND = 5
METADATA_TOKENS, SONG_TOKENS = 1024, 2560
"""The DiT reads 2,048 tokens of lyrics: a song that goes on beyond that is cut where it would be cut anyway."""

WARM_SONGS = (1, 2, 5)
"""One has a program of its own; from the second and third count the compiler learns that the count changes."""

WORDS_SHARE = 0.1
"""Of the planning stage's progress: the words are a few hundred tokens, the codes of a song 1,500."""

_ALWAYS_CONSTRAINED = "constrained_decoding = false has no effect: metadata is always held to its grammar"
_NUMBER = re.compile(r"<\|audio_code_(\d+)\|>")


@dataclass(frozen=True, slots=True)
class PlanDraft:
    """The song so far. ``caption`` is what the model is told; one of its own stands in the metadata."""

    caption: str
    lyrics: str
    metadata: Metadata
    warnings: tuple[str, ...] = ()


class SongPlanner:
    """Writes plans at a desk; one call per job, any number at a time."""

    def __init__(self, desk: EngineLoop, tokens: LmTokens) -> None:
        self._desk = desk
        self._tokens = tokens

    async def warm_up(self) -> None:
        """Do once what is slow the first time: a grammar of each kind, and choosing for a few counts of songs."""
        prompt = self._tokens.encode(prompts.rewrite("", ""))
        for grammar in (metadata_grammar(), song_grammar()):
            await self._desk.write(_begun(prompt, Text(grammar, max_tokens=1, cut=True)))
        for songs in WARM_SONGS:
            await asyncio.gather(*(self._desk.write(_begun(prompt, Codes(2))) for _ in range(songs)))

    async def write(self, job: Job, heard: TokenizedSource | None, report: Report) -> Plan:
        """Return the plan of one job. Raises ``PlanFailed``."""
        request = job.request
        draft = given(job)
        if heard is not None:
            draft = await self._describe(job, draft, heard)
            return _plan(job, draft)
        if request.sample_mode or request.sample_query:
            draft = await self._invent(job, draft)
        elif request.use_format:
            draft = await self._rewrite(job, draft)
        report(WORDS_SHARE / 2, "plan")
        if wants_metadata(job, draft):
            draft = await self._complete(job, draft)
        report(WORDS_SHARE, "plan")
        if job.analysis or not request.thinking or request.audio_code_string:
            return _plan(job, draft, _given_codes(request))
        return _plan(job, draft, await self._codes(job, draft, report))

    async def _describe(self, job: Job, draft: PlanDraft, heard: TokenizedSource) -> PlanDraft:
        """Words and metadata of a song that was heard."""
        prompt = prompts.understand(map(int, _NUMBER.findall(heard.codes)))
        fixed = replace(draft.metadata, duration=_whole(heard.source_s))
        return _merge(draft, await self._song(job, prompt, fixed), request=None)

    async def _invent(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """A whole song from a description."""
        request = job.request
        query = request.sample_query or request.prompt
        instrumental = "lyrics" in job.given and request.instrumental
        prompt = prompts.sample(query, instrumental=instrumental)
        return _merge(draft, await self._song(job, prompt, draft.metadata), request)

    async def _rewrite(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """Better words for the same song."""
        prompt = prompts.rewrite(draft.caption, draft.lyrics)
        return _merge(draft, await self._song(job, prompt, draft.metadata), request=None)

    async def _complete(self, job: Job, draft: PlanDraft) -> PlanDraft:
        """The metadata that is missing."""
        request = job.request
        fields = _fields(request)
        fixed = replace(draft.metadata, caption=None)
        grammar = metadata_grammar(fixed, fields=fields, max_duration_s=job.policy.limits.max_duration_s)
        guided = prompts.metadata_phase(draft.caption, draft.lyrics, request.lm_negative_prompt)
        found = _read(await self._text(job, guided, grammar, METADATA_TOKENS))
        return replace(draft, metadata=found)

    async def _song(self, job: Job, prompt: Prompt, fixed: Metadata) -> Metadata:
        """Metadata and lyrics, without guidance: there is nothing to be led away from."""
        grammar = song_grammar(replace(fixed, caption=None), max_duration_s=job.policy.limits.max_duration_s)
        return _read(await self._text(job, prompt, grammar, SONG_TOKENS))

    async def _text(self, job: Job, prompt: Prompt | GuidedPrompts, grammar: str, max_tokens: int) -> str:
        away = prompt.unconditional if isinstance(prompt, GuidedPrompts) else None
        generation = Generation(
            prompt=self._tokens.encode(prompt.conditional if isinstance(prompt, GuidedPrompts) else prompt),
            unconditional=self._tokens.encode(away) if away else None,
            constraint=Text(grammar, max_tokens, cut=away is None),
            sampling=sampling_of(job.request, job.seeds[0], guided=away is not None),
        )
        return self._tokens.decode(await self._desk.write(generation))

    async def _codes(self, job: Job, draft: PlanDraft, report: Report) -> tuple[str, ...]:
        """Audio codes for every song, side by side or one after the other."""
        duration = draft.metadata.duration or job.request.audio_duration
        if duration is None:
            raise PlanFailed("no duration was given or planned, so nobody knows how many audio codes to write")
        seconds = job.request.audio_duration or duration
        count = round(CODES_PER_SECOND * seconds)
        guided = prompts.codes_phase(draft.caption, draft.lyrics, draft.metadata, job.request.lm_negative_prompt)
        told = _total(len(job.seeds), count, report)
        songs = [self._song_codes(job, guided, count, seed, told(song)) for song, seed in enumerate(job.seeds)]
        if job.request.allow_lm_batch:
            return tuple(await asyncio.gather(*songs))
        return tuple([await song for song in songs])

    async def _song_codes(
        self, job: Job, guided: GuidedPrompts, count: int, seed: int, told: Callable[[int], None]
    ) -> str:
        generation = Generation(
            prompt=self._tokens.encode(guided.conditional),
            unconditional=self._tokens.encode(guided.unconditional),
            constraint=Codes(count),
            sampling=sampling_of(job.request, seed, guided=True),
        )
        return self._tokens.code_text(await self._desk.write(generation, told))


def _begun(prompt: tuple[int, ...], constraint: Codes | Text) -> Generation:
    """A few tokens that nobody reads, guided and drawn as a request's are by default."""
    sampling = sampling_of(GenerationRequest(), 0, guided=True)
    return Generation(prompt=prompt, unconditional=prompt, constraint=constraint, sampling=sampling)


def given(job: Job) -> PlanDraft:
    """What the request says itself; only what it really gives is fixed."""
    request = job.request
    seconds = request.audio_duration
    return PlanDraft(
        caption=request.prompt,
        lyrics=request.lyrics,
        metadata=Metadata(
            bpm=request.bpm,
            duration=None if seconds is None else _whole(seconds),
            keyscale=request.key_scale,
            language=request.vocal_language if "vocal_language" in job.given else None,
            timesignature=request.time_signature,
        ),
        warnings=() if request.constrained_decoding else (_ALWAYS_CONSTRAINED,),
    )


def wants_metadata(job: Job, draft: PlanDraft) -> bool:
    """Whether the metadata phase has anything to do: codes are always planned on complete thoughts."""
    request = job.request
    missing = any(getattr(draft.metadata, field) is None for field in ("bpm", "duration", "keyscale", "timesignature"))
    return request.thinking or request.analysis_only or missing


def sampling_of(request: GenerationRequest, seed: int, *, guided: bool) -> Sampling:
    """The request's ``lm_`` settings."""
    return Sampling(
        seed=seed,
        temperature=request.lm_temperature,
        cfg_scale=request.lm_cfg_scale if guided else 1.0,
        top_k=request.lm_top_k,
        top_p=request.lm_top_p,
        repetition_penalty=request.lm_repetition_penalty,
    )


def _fields(request: GenerationRequest) -> Collection[str]:
    """Lines of the thoughts: caption and language can be switched off."""
    off = {
        name for name, on in (("caption", request.use_cot_caption), ("language", request.use_cot_language)) if not on
    }
    return [field for field in FIELDS if field not in off]


def _may_rewrite_caption(request: GenerationRequest) -> bool:
    return request.use_cot_caption and not request.is_format_caption


def _merge(draft: PlanDraft, found: Metadata, request: GenerationRequest | None) -> PlanDraft:
    """Take over what was written, but keep words that ``request`` gives."""
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


def _given_codes(request: GenerationRequest) -> tuple[str, ...]:
    return (request.audio_code_string,) if request.audio_code_string else ()


def _read(text: str) -> Metadata:
    try:
        return parse(text)
    except MetadataError as error:
        raise PlanFailed(f"the language model's metadata cannot be used: {error}") from error


def _whole(seconds: float) -> int:
    return min(max(round(seconds), MIN_DURATION_S), MAX_DURATION_S)


def _total(songs: int, count: int, report: Report) -> Callable[[int], Callable[[int], None]]:
    """Progress over all songs: codes written of codes wanted."""
    written = [0] * songs

    def told(song: int) -> Callable[[int], None]:
        def hear(so_far: int) -> None:
            written[song] = so_far
            report(WORDS_SHARE + (1 - WORDS_SHARE) * sum(written) / (songs * count), "plan")

        return hear

    return told
