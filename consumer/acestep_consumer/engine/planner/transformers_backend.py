# SPDX-License-Identifier: Apache-2.0
"""The backend on transformers, for any device: continuous batching of sequences that join and leave at any step.

Each step reads one token of every row, and the whole prompts of new sequences; then all sequences choose their next
token together. A guided sequence is two rows, its prompt and its unconditional prompt, which get the same tokens: a
pair cannot fall out of step here. transformers' own continuous batching cannot do this: it schedules, preempts and
restarts each request by itself, so that two requests cannot be kept at the same token; its logits processors know
neither the request of a row nor its grammar; and all requests share one random generator.

The host has the whole state of a sequence: its prompts and its output. The device's state follows from it, is built
when sequences join or leave, and is updated in place in between. A step waits for the device once, for the tokens.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from acestep_consumer.concurrency.priority import insert
from acestep_consumer.config.settings import Quantization
from acestep_consumer.engine.planner.backend import Generation, SequenceOutput, TextConstraint
from acestep_consumer.engine.planner.row_cache import ATTENTION, RowCache
from acestep_consumer.engine.planner.row_table import Row, RowGroup, RowTable, VocabularySlice
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import GrammarRefused, TokenMasks, end_tokens
from acestep_consumer.engine.renderer.quantization import quantize

PREFILL_TOKENS = 8192
"""Tokens of new prompts, with padding, that one step reads; further ones wait for the next step."""

_RUNS_BEFORE_CAPTURE = 2
"""Runs of a pass before it is captured: a capture costs about as much as a run."""


class TransformersBackend:
    """Implements ``Backend`` on a causal language model of transformers.

    The model has full attention in all layers and a plain linear head. ``codes`` are the token ids of the audio codes.
    ``cache_tokens`` bounds the key-value cache: a sequence joins once the rectangle (rows × the longest one's final
    length) stays within it, so that none has to be preempted later. ``masks`` are those of ``masks_for``, if they
    outlive the backend.
    """

    def __init__(  # noqa: PLR0913 - the last two have defaults that all callers but one use
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
            raise ValueError("the language model has layers without full attention")
        model.set_attn_implementation(ATTENTION)
        head = model.get_output_embeddings()
        self._body = model.get_decoder()
        self._device: torch.device = model.device
        self._context: int = config.max_position_embeddings
        self._vocabulary: int = len(head.weight)
        self._masks = masks or masks_for(model, tokenizer)
        self._code_vocabulary = _vocabulary_slice(head, codes, None)
        self._text_vocabulary = _vocabulary_slice(head, range(self._vocabulary), self._masks)
        self._cache = RowCache(config.num_hidden_layers)
        self._graph = CudaGraph(self._device)
        self._cache_tokens = cache_tokens
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[TokenSequence] = deque()
        self._rows: list[Row] = []  # in the order of the cache
        self._table: RowTable | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to generate."""
        return not self._rows and not self._waiting

    @property
    def songs(self) -> int | None:
        """Only memory bounds the batch."""
        return None

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for memory or for a row of the batch."""
        return len(self._waiting)

    def add(self, sequence_id: int, generation: Generation) -> None:
        """Add a sequence; it joins the batch at the next step, or once there is memory for it, by its rank."""
        insert(self._waiting, TokenSequence(sequence_id, generation), lambda each: each.rank)

    @torch.inference_mode()
    def drop(self, sequence_id: int) -> None:
        """Drop a sequence; unknown ids are ignored."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.sequence_id != sequence_id)
        self._remove({sequence for sequence, _ in self._rows if sequence.sequence_id == sequence_id})

    @torch.inference_mode()
    def step(self) -> Sequence[SequenceOutput]:
        """Generate the next token of every sequence. Returns the progress of those that moved."""
        joining, outputs = self._admit()
        sequences = dict.fromkeys(sequence for sequence, _ in self._rows) | dict.fromkeys(joining)
        if not sequences:
            return outputs
        tokens = self._next_tokens(joining)
        last = {sequence: sequence.advance(tokens[sequence]) for sequence in sequences}
        self._remove({sequence for sequence, done in last.items() if done})
        return [*outputs, *(done or sequence.progress for sequence, done in last.items())]

    def _admit(self) -> tuple[list[TokenSequence], list[SequenceOutput]]:
        """Take sequences that fit from the queue. Returns them, and the final outputs of those that never will."""
        joining: list[TokenSequence] = []
        refusals: list[SequenceOutput] = []
        while self._waiting:
            sequence = self._waiting[0]
            error = self._refusal(sequence)
            if error is None and not self._has_room(joining, sequence):
                break
            error = error or self._start_grammar(sequence)
            if error is None:
                joining.append(sequence)
            else:
                too_long = sequence.max_length > self._context
                refusals.append(SequenceOutput(sequence.sequence_id, 0, error=error, too_long=too_long))
            self._waiting.popleft()
        return joining, refusals

    def _refusal(self, sequence: TokenSequence) -> str | None:
        """Return why this sequence can never be generated, as public text; None when it can."""
        if refusal := sequence.refusal(self._vocabulary, self._context):
            return refusal
        if RowCache.area(len(sequence.prompts), sequence.max_length) > self._cache_tokens:
            return f"prompt and text need {sequence.max_length} tokens; the planner's memory is too small"
        return None

    def _has_room(self, joining: list[TokenSequence], sequence: TokenSequence) -> bool:
        """Whether the sequence fits beside the running ones and those that join in this step."""
        new = [len(prompt) for each in (*joining, sequence) for prompt in each.prompts]
        if joining and len(new) * max(new) > self._prefill_tokens:
            return False
        together = (sequence, *joining, *(running for running, _ in self._rows))
        max_length = max(each.max_length for each in together)
        return RowCache.area(len(self._rows) + len(new), max_length) <= self._cache_tokens

    def _start_grammar(self, sequence: TokenSequence) -> str | None:
        """Compile its grammar. Returns the error, if any."""
        constraint = sequence.generation.constraint
        if isinstance(constraint, TextConstraint):
            try:
                sequence.text = self._masks.start(constraint.grammar)
            except GrammarRefused as error:
                return f"the grammar is invalid: {error}"
        return None

    def _next_tokens(self, joining: list[TokenSequence]) -> dict[TokenSequence, int]:
        """Read the new tokens of every row, including new prompts, and choose each sequence's next token."""
        running = len(self._rows)
        new_rows: list[Row] = [(sequence, branch) for sequence in joining for branch in range(len(sequence.prompts))]
        longest = max(sequence.length(branch) for sequence, branch in (*self._rows, *new_rows))
        self._cache.fit(running + len(new_rows), longest)
        hidden = [self._read_last(self._table or self._new_table(unread=1), longest)] if running else []
        if new_rows:
            hidden.append(self._read_prompts([sequence.prompts[branch] for sequence, branch in new_rows], running))
            self._rows += new_rows
            self._table = None
        self._table = self._table or self._new_table(unread=0)
        return self._table.advance(torch.cat(hidden))

    def _read_last(self, table: RowTable, longest: int) -> Tensor:
        """Run the model on the last token of every row. Returns hidden states, [rows, channels]."""

        def read() -> Tensor:
            mask = self._cache.decode(table.positions, read_width)
            return self._run(table.ids[:, None], position_ids=table.positions[:, None], attention_mask=mask)[:, 0]

        read_width = self._cache.read_width(longest)
        hidden = self._graph.run((table, read_width, self._cache.shape), read)
        table.positions += 1
        self._table = table
        return hidden

    def _read_prompts(self, prompts: list[tuple[int, ...]], first: int) -> Tensor:
        """Run the model on whole prompts, padded on the right. Returns their last hidden states, [rows, channels].

        Causal attention does not attend to the padding, and in the cache it is beyond the row's end.
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

    def _remove(self, gone: set[TokenSequence]) -> None:
        """Free the rows of sequences; the last rows move into the gaps."""
        if not gone:
            return
        staying = [row for row, (sequence, _) in enumerate(self._rows) if sequence not in gone]
        gaps = [row for row in range(len(staying)) if self._rows[row][0] in gone]
        moving = [row for row in staying if row >= len(staying)]
        if moving:
            self._cache.move(moving, gaps)
        for row, gap in zip(moving, gaps, strict=True):
            self._rows[gap] = self._rows[row]
        del self._rows[len(staying) :]
        self._table = None
        self._graph.clear()  # it would hold memory that the cache frees
        self._cache.fit(len(self._rows), max((sequence.length(branch) for sequence, branch in self._rows), default=0))

    def _new_table(self, unread: int) -> RowTable:
        sequences = dict.fromkeys(sequence for sequence, _ in self._rows)
        codes = [sequence for sequence in sequences if sequence.text is None]
        texts = [sequence for sequence in sequences if sequence.text is not None]
        parts = ((codes, self._code_vocabulary), (texts, self._text_vocabulary))
        groups = [RowGroup(members, self._rows, part) for members, part in parts if members]
        return RowTable(self._rows, groups, unread, self._device)


class CudaGraph:
    """Runs a forward pass, and replays it as a CUDA graph from the third time in a row on; on CPUs it only runs it.

    A decoding step of a small model takes a GPU less time than the host needs to launch its thousand kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self._enabled = device.type == "cuda"
        self._key: Hashable = None
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Return the result of ``work``; a replay overwrites the tensor returned before.

        ``key`` identifies everything that a graph fixes: shapes, and the tensors that ``work`` reads and writes.
        """
        if key != self._key:
            self.clear()
            self._key = key
        if self._enabled and self._graph is None and self._runs >= _RUNS_BEFORE_CAPTURE:
            self._capture(work)
        if self._graph is None:
            self._runs += 1
            return work()
        self._graph.replay()
        return self._output

    def clear(self) -> None:
        """Free the graph and the tensors that it holds."""
        self._key, self._runs, self._graph = None, 0, None
        self._output = torch.empty(0)

    def _capture(self, work: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = work()
        self._graph = graph


def load(path: str, device: str, dtype: torch.dtype, quantization: Quantization | None = None) -> Any:
    """Load a model from a folder or the hub: safetensors only, and no code of the checkpoint is run.

    Raises:
        OSError: a file is missing.
        ValueError: weights are missing.
        QuantizationUnavailable: torchao is missing.
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
        raise ValueError(f"the weights of {len(missing)} tensors are missing, such as {missing[0]}")
    quantize(model, quantization, device)
    return model.to(device).eval()


def masks_for(model: Any, tokenizer: Any) -> TokenMasks:
    """Return the mask compiler of a model. It caches compiled grammars."""
    ends = end_tokens(tokenizer, getattr(model.generation_config, "eos_token_id", None))
    return TokenMasks(tokenizer, len(model.get_output_embeddings().weight), ends)


def _vocabulary_slice(head: Any, ids: range, masks: TokenMasks | None) -> VocabularySlice:
    rows = slice(ids.start, ids.stop)
    return VocabularySlice(
        ids, head.weight[rows].detach(), None if head.bias is None else head.bias[rows].detach(), masks
    )
