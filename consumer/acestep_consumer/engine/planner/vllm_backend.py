# SPDX-License-Identifier: Apache-2.0
"""The backend for GPUs: vLLM writes the sequences, and a logits processor of ours decides their tokens.

A guided song is two requests. vLLM may start a request late, read its prompt in pieces, or throw it out when memory
runs short, and any of that would tear a pair apart. It has no reason to as long as it is never given more than it can
take: a song enters when both its prompts fit into the very next step, and when there is room for all that it and the
others will ever write. Should a pair be torn all the same, the processor notices, and the song is void.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig

from acestep_consumer.engine.planner import vllm_engine
from acestep_consumer.engine.planner.backend import Generation, Text, Written
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import GrammarRefused, TokenMasks
from acestep_consumer.engine.planner.vllm_engine import EngineOutput, EngineSize, VllmEngine
from acestep_consumer.engine.planner.vllm_sequence import SharedState, VllmSequence

NEWS_EVERY = 8
"""A song has news of its first token, and then of every so many: 1.6 seconds of song."""


class VllmBackend:
    """Implements ``Backend``. Make it with ``open_vllm``.

    ``stage`` is the one that the engine's logits processor reads. Without masks in it no text can be written.
    """

    def __init__(self, engine: VllmEngine, stage: SharedState) -> None:
        self._engine = engine
        self._stage = stage
        self._ends = stage.masks.ends if stage.masks else frozenset()
        self._room = engine.room()
        self._drafts = stage.drafts
        self._waiting: deque[TokenSequence] = deque()
        self._refused: list[Written] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to write."""
        return not (self._drafts or self._waiting or self._refused)

    def add(self, number: int, generation: Generation) -> None:
        """Take a sequence in; it joins the others at the next step, or waits for room, first come first served."""
        song = TokenSequence(number, generation)
        error = self._refusal(song)
        if error is None:
            self._waiting.append(song)
        else:
            self._refused.append(Written(number, 0, error=error))

    def drop(self, number: int) -> None:
        """Forget a sequence; unknown numbers are ignored."""
        self._waiting = deque(song for song in self._waiting if song.number != number)
        self._refused = [news for news in self._refused if news.number != number]
        if number in self._drafts:
            self._engine.abort(self._drafts[number].song)
            self._release(number)

    def step(self) -> Sequence[Written]:
        """Write the next token of every sequence; return news of those that are done, and now and then of the others.

        Whatever vLLM raises here means that its engine is broken, and nothing can be written any more.
        """
        self._admit()
        news, self._refused = self._refused, []
        if self._drafts:
            finished = self._engine.step()
            for number, draft in list(self._drafts.items()):
                told = self._conclude(draft, finished.get(number, [])) or self._progress(draft)
                if told is not None:
                    news.append(told)
        return news

    def close(self) -> None:
        """Give the memory back; the backend is of no use afterwards."""
        self._engine.close()

    def _admit(self) -> None:
        """Hand over who fits, in the order they came."""
        self._room.begin_step()
        while self._waiting:
            song = self._waiting[0]
            need = self._room.need(song.prompts, song.wanted)
            if not self._room.take(need):
                break
            self._waiting.popleft()
            self._drafts[song.number] = VllmSequence(song, need)
            try:
                self._engine.submit(song, self._ends)
            except ValueError as error:
                self._release(song.number)
                self._refused.append(Written(song.number, 0, error=f"the language model does not take this: {error}"))

    def _refusal(self, song: TokenSequence) -> str | None:
        """Why this sequence can never be written, in public words; None when it can. Gets a text's grammar ready."""
        if not all(song.prompts) or song.wanted < 1:
            return "an empty prompt, or no token to write"
        if any(not 0 <= token < self._engine.vocabulary for prompt in song.prompts for token in prompt):
            return "the prompt has a token that the language model does not know"
        if song.width > self._engine.context:
            return f"prompt and text need {song.width} tokens; the language model has room for {self._engine.context}"
        if not self._room.could_hold(self._room.need(song.prompts, song.wanted)):
            return f"prompt and text need {song.width} tokens; the planner's memory has no room for that"
        return self._begin(song)

    def _begin(self, song: TokenSequence) -> str | None:
        constraint = song.generation.constraint
        if isinstance(constraint, Text):
            if self._stage.masks is None:
                return "the language model was loaded without its tokenizer: it writes codes only"
            try:
                song.text = self._stage.masks.start(constraint.grammar)
            except GrammarRefused as error:
                return f"the grammar is not valid: {error}"
        return None

    def _conclude(self, draft: VllmSequence, outputs: Sequence[EngineOutput]) -> Written | None:
        """The last news of a song that is finished, or void."""
        if not outputs and not draft.void:
            return None
        self._engine.abort(draft.song)  # of a torn pair, one may still be inside
        self._release(draft.song.number)
        torn = draft.out_of_step or len(outputs) != len(draft.song.prompts) or len(set(outputs)) != 1
        if draft.error is not None:
            return Written(draft.song.number, draft.chosen, error=draft.error)
        if torn:
            return Written(draft.song.number, draft.chosen, out_of_step=True)
        return self._read(draft.song, outputs[0])

    def _read(self, song: TokenSequence, output: EngineOutput) -> Written:
        """Take what vLLM has written; its numbers are checked because a model without probabilities writes anything."""
        count = len(output.tokens)
        if song.text is not None:
            if output.stopped:
                return Written(song.number, count - 1, tokens=output.tokens[:-1])
            if song.may_stop:
                return Written(song.number, count, tokens=output.tokens)
            return Written(song.number, count, error=f"the text has no end within {song.wanted} tokens")
        if count != song.wanted or not all(token in self._stage.codes for token in output.tokens):
            return Written(song.number, count, error="the language model gave no probabilities")
        return Written(song.number, count, tokens=output.tokens)

    def _progress(self, draft: VllmSequence) -> Written | None:
        count = draft.chosen - self._engine.ahead
        if count < (draft.told + NEWS_EVERY if draft.told else 1):
            return None
        draft.told = count
        return Written(draft.song.number, count)

    def _release(self, number: int) -> None:
        self._room.leave(self._drafts.pop(number).need)


def open_vllm(
    model: str, tokenizer: Any, codes: range, size: EngineSize, *, compiled: bool = False, **options: Any
) -> VllmBackend:
    """Load a model from a folder; ``codes`` are the token ids of the audio codes.

    ``tokenizer`` is transformers'; with None, codes are all that can be written. ``compiled``: see ``SharedState``.
    ``options`` go to vLLM (``EngineArgs``).

    Raises:
        VllmUnavailable: vLLM is not there, not in a version that has been tested, or lacks the memory.
        OSError: the folder has no configuration.
    """
    vllm_engine.prepare()
    from acestep_consumer.engine.planner.vllm_guidance import processor_for  # noqa: PLC0415 - it imports vLLM, which wants ``prepare`` first

    width = AutoConfig.from_pretrained(model).vocab_size
    masks = None if tokenizer is None else TokenMasks(tokenizer, width, _ends(model, tokenizer))
    stage = SharedState({}, range(width), codes, masks, compiled)
    return VllmBackend(vllm_engine.start(model, processor_for(stage), size, **options), stage)


def _ends(model: str, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's and those of the model's generation settings."""
    try:
        more = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        more = None
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not ends:
        raise ValueError("the tokenizer names no token that ends a text")
    return frozenset(ends)
