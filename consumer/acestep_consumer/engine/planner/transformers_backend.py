# SPDX-License-Identifier: Apache-2.0
"""The backend that runs wherever transformers does: one batch of sequences, which join and leave at any step.

Each step reads one token of every row, and the whole prompts of newcomers; then all songs choose their next token
together. A guided song is two rows, its prompt and its unconditional prompt, which are given the same tokens: a pair
cannot fall out of step here. transformers' own continuous batching has no such thing: it schedules, evicts and
restarts each request alone, so that two requests cannot be kept at the same token; its logits processors are told
neither the request of a row nor its grammar; and all requests draw from one random generator.

The host knows everything about a song: its prompts and what it has written. What is on the device follows from that,
is built anew when songs come or go, and is carried on from step to step in between. A step waits for the device once,
for the tokens.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from acestep_consumer.engine.planner.backend import Generation, Text, Written
from acestep_consumer.engine.planner.cuda_graph import CudaGraph
from acestep_consumer.engine.planner.row_cache import ATTENTION, RowCache
from acestep_consumer.engine.planner.row_table import Row, RowGroup, RowTable, VocabularySlice
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import GrammarRefused, TokenMasks

PREFILL_TOKENS = 8192
"""How many tokens of newcomers' prompts, with padding, one step reads; the others wait a step for it."""


class TransformersBackend:
    """Implements ``Backend`` on a causal language model of transformers.

    The model has full attention in all layers and a plain linear head. ``codes`` are the token ids of the audio codes.
    ``cache_tokens`` bounds the memory for keys and values, as a number of tokens: a sequence joins once the rectangle
    (rows × what the longest will hold at its end) stays within it, so that none has to be thrown out later. ``masks``
    are those of ``masks_for``, when they outlive the backend.
    """

    def __init__(  # noqa: PLR0913 - the last two have defaults that suit everybody but one caller each
        self,
        model: Any,
        tokenizer: Any,
        codes: range,
        *,
        cache_tokens: int,
        prefill_tokens: int = PREFILL_TOKENS,
        masks: TokenMasks | None = None,
    ) -> None:
        config = model.config
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ValueError("the language model has layers of another kind than full attention")
        model.set_attn_implementation(ATTENTION)
        head = model.get_output_embeddings()
        self._body = model.get_decoder()
        self._device: torch.device = model.device
        self._context: int = config.max_position_embeddings
        self._vocabulary: int = len(head.weight)
        self._masks = masks or masks_for(model, tokenizer)
        self._codes, self._words = _part(head, codes, None), _part(head, range(self._vocabulary), self._masks)
        self._cache = RowCache(config.num_hidden_layers)
        self._replay = CudaGraph(self._device)
        self._cache_tokens = cache_tokens
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[TokenSequence] = deque()
        self._rows: list[Row] = []  # as they are in the cache
        self._table: RowTable | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to write."""
        return not self._rows and not self._waiting

    def add(self, number: int, generation: Generation) -> None:
        """Take a sequence in; it joins the others at the next step, or waits for room, first come first served."""
        self._waiting.append(TokenSequence(number, generation))

    @torch.inference_mode()
    def drop(self, number: int) -> None:
        """Forget a sequence; unknown numbers are ignored."""
        self._waiting = deque(song for song in self._waiting if song.number != number)
        self._leave({song for song, _ in self._rows if song.number == number})

    @torch.inference_mode()
    def step(self) -> Sequence[Written]:
        """Write the next token of every sequence; return news of those that moved."""
        newcomers, news = self._admit()
        songs = dict.fromkeys(song for song, _ in self._rows) | dict.fromkeys(newcomers)
        if not songs:
            return news
        tokens = self._next_tokens(newcomers)
        last = {song: song.advance(tokens[song]) for song in songs}
        self._leave({song for song, done in last.items() if done})
        return [*news, *(done or song.news for song, done in last.items())]

    def _admit(self) -> tuple[list[TokenSequence], list[Written]]:
        """Take from the queue who fits; return them, and the last news of those who never will."""
        newcomers: list[TokenSequence] = []
        refused: list[Written] = []
        while self._waiting:
            song = self._waiting[0]
            error = self._refusal(song)
            if error is None and not self._has_room(newcomers, song):
                break
            error = error or self._begin(song)
            if error is None:
                newcomers.append(song)
            else:
                refused.append(Written(song.number, 0, error=error))
            self._waiting.popleft()
        return newcomers, refused

    def _refusal(self, song: TokenSequence) -> str | None:
        """Why this sequence can never be written, in public words; None when it can."""
        if not all(song.prompts) or song.wanted < 1:
            return "an empty prompt, or no token to write"
        if any(not 0 <= token < self._vocabulary for prompt in song.prompts for token in prompt):
            return "the prompt has a token that the language model does not know"
        if song.width > self._context:
            return f"prompt and text need {song.width} tokens; the language model has room for {self._context}"
        if RowCache.area(len(song.prompts), song.width) > self._cache_tokens:
            return f"prompt and text need {song.width} tokens; the planner's memory has no room for that"
        return None

    def _has_room(self, newcomers: list[TokenSequence], song: TokenSequence) -> bool:
        """Whether the song fits beside those who are there and those who join in this step."""
        new = [len(prompt) for joining in (*newcomers, song) for prompt in joining.prompts]
        if newcomers and len(new) * max(new) > self._prefill_tokens:
            return False
        width = max([song.width, *(other.width for other in newcomers), *(other.width for other, _ in self._rows)])
        return RowCache.area(len(self._rows) + len(new), width) <= self._cache_tokens

    def _begin(self, song: TokenSequence) -> str | None:
        """Get its grammar ready; return why that fails."""
        constraint = song.generation.constraint
        if isinstance(constraint, Text):
            try:
                song.text = self._masks.start(constraint.grammar)
            except GrammarRefused as error:
                return f"the grammar is not valid: {error}"
        return None

    def _next_tokens(self, newcomers: list[TokenSequence]) -> dict[TokenSequence, int]:
        """Read what is new in every row, newcomers' prompts included, and choose each song's next token."""
        old = len(self._rows)
        joining: list[Row] = [(song, branch) for song in newcomers for branch in range(len(song.prompts))]
        longest = max(song.length(branch) for song, branch in (*self._rows, *joining))
        self._cache.fit(old + len(joining), longest)
        hidden = [self._read_last(self._table or self._new_table(unread=1), longest)] if old else []
        if joining:
            hidden.append(self._read_prompts([song.prompts[branch] for song, branch in joining], old))
            self._rows += joining
            self._table = None
        self._table = self._table or self._new_table(unread=0)
        return self._table.advance(torch.cat(hidden))

    def _read_last(self, table: RowTable, longest: int) -> Tensor:
        """Run the model on the last token of every row; hidden states [rows, channels]."""

        def read() -> Tensor:
            mask = self._cache.decode(table.positions, read_width)
            return self._run(table.ids[:, None], position_ids=table.positions[:, None], attention_mask=mask)[:, 0]

        read_width = self._cache.read_width(longest)
        hidden = self._replay.run((table, read_width, self._cache.shape), read)
        table.positions += 1
        self._table = table
        return hidden

    def _read_prompts(self, prompts: list[tuple[int, ...]], first: int) -> Tensor:
        """Run the model on whole prompts, padded on the right; hidden states of the last tokens [rows, channels].

        Causal attention does not look at the padding, and in the cache it lies beyond the row's end.
        """
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        lasts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        self._cache.prefill(first)
        hidden = self._run(ids.to(self._device), position_ids=torch.arange(ids.shape[1], device=self._device)[None])
        return hidden[torch.arange(len(prompts), device=self._device), lasts]

    def _run(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        output = self._body(input_ids=ids, past_key_values=self._cache, use_cache=True, **inputs)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _leave(self, gone: set[TokenSequence]) -> None:
        """Free the rows of songs; the last rows move into the holes."""
        if not gone:
            return
        staying = [row for row, (song, _) in enumerate(self._rows) if song not in gone]
        holes = [row for row in range(len(staying)) if self._rows[row][0] in gone]
        movers = [row for row in staying if row >= len(staying)]
        if movers:
            self._cache.move(movers, holes)
        for mover, hole in zip(movers, holes, strict=True):
            self._rows[hole] = self._rows[mover]
        del self._rows[len(staying) :]
        self._table = None
        self._replay.forget()  # it would hold on to memory that the cache gives back
        self._cache.fit(len(self._rows), max((song.length(branch) for song, branch in self._rows), default=0))

    def _new_table(self, unread: int) -> RowTable:
        songs = dict.fromkeys(song for song, _ in self._rows)
        codes = [song for song in songs if song.text is None]
        texts = [song for song in songs if song.text is not None]
        parts = ((codes, self._codes), (texts, self._words))
        groups = [RowGroup(members, self._rows, part) for members, part in parts if members]
        return RowTable(self._rows, groups, unread, self._device)


def load(path: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or the hub: safetensors only, and no code of theirs is run.

    Raises OSError when something is not there, ValueError when the weights are not all there.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights of {len(missing)} tensors are missing, {missing[0]} among them")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def masks_for(model: Any, tokenizer: Any) -> TokenMasks:
    """Return the masks of a model's texts. They keep the grammars that have been compiled."""
    return TokenMasks(tokenizer, len(model.get_output_embeddings().weight), _ends(model, tokenizer))


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's and those of the model's generation settings."""
    more = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not ends:
        raise ValueError("the tokenizer names no token that ends a text")
    return frozenset(ends)


def _part(head: Any, ids: range, masks: TokenMasks | None) -> VocabularySlice:
    rows = slice(ids.start, ids.stop)
    return VocabularySlice(
        ids, head.weight[rows].detach(), None if head.bias is None else head.bias[rows].detach(), masks
    )
