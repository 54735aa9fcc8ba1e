# SPDX-License-Identifier: Apache-2.0
"""The backend on vLLM, for GPUs: vLLM runs the model, and our logits processor chooses the tokens.

A guided sequence is two requests. vLLM may start a request late, read its prompt in chunks, or preempt it when memory
runs short, and any of these would break a pair. It has no reason to as long as it never gets more than it can hold: a
sequence is submitted when both its prompts fit into the very next step, and when there is memory for everything that it
and the others will ever generate. If a pair breaks all the same, the processor notices, and the sequence is void.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig

from acestep_consumer.concurrency.priority import insert
from acestep_consumer.engine.planner import vllm_engine
from acestep_consumer.engine.planner.backend import Generation, SequenceOutput, TextConstraint
from acestep_consumer.engine.planner.sequence import TokenSequence
from acestep_consumer.engine.planner.token_masks import GrammarRefused, TokenMasks, end_tokens
from acestep_consumer.engine.planner.vllm_engine import EngineOutput, EngineSize, VllmEngine
from acestep_consumer.engine.planner.vllm_sequence import SharedState, VllmSequence

PROGRESS_EVERY = 8
"""Progress is reported for the first token, and then for every so many: 1.6 seconds of audio."""


class VllmBackend:
    """Implements ``Backend``. Make it with ``open_vllm``.

    ``shared`` is read by the engine's logits processor. Without masks in it, only codes can be generated.
    """

    def __init__(self, engine: VllmEngine, shared: SharedState) -> None:
        self._engine = engine
        self._shared = shared
        self._ends = shared.masks.ends if shared.masks else frozenset()
        self._budget = engine.kv_budget()
        self._running = shared.running
        self._waiting: deque[TokenSequence] = deque()
        self._refused: list[SequenceOutput] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to generate."""
        return not (self._running or self._waiting or self._refused)

    @property
    def songs(self) -> int | None:
        """Guided songs that the batch has rows for, two each."""
        return self._budget.rows // 2

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for memory or for a row of the batch."""
        return len(self._waiting)

    def add(self, sequence_id: int, generation: Generation) -> None:
        """Add a sequence; it joins the batch at the next step, or once there is memory for it, by its rank."""
        sequence = TokenSequence(sequence_id, generation)
        error = self._refusal(sequence)
        if error is None:
            insert(self._waiting, sequence, lambda each: each.rank)
        else:
            too_long = sequence.max_length > self._engine.context
            self._refused.append(SequenceOutput(sequence_id, 0, error=error, too_long=too_long))

    def drop(self, sequence_id: int) -> None:
        """Drop a sequence; unknown ids are ignored."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.sequence_id != sequence_id)
        self._refused = [output for output in self._refused if output.sequence_id != sequence_id]
        if sequence_id in self._running:
            self._engine.abort(self._running[sequence_id].sequence)
            self._release(sequence_id)

    def step(self) -> Sequence[SequenceOutput]:
        """Generate the next token of every sequence. Returns those that are finished, and now and then the others.

        An exception of vLLM means that its engine has failed, and that nothing can be generated any more.
        """
        self._admit()
        outputs, self._refused = self._refused, []
        if self._running:
            finished = self._engine.step()
            for sequence_id, state in list(self._running.items()):
                output = self._final_output(state, finished.get(sequence_id, [])) or self._progress(state)
                if output is not None:
                    outputs.append(output)
        return outputs

    def close(self) -> None:
        """Free the memory; the backend cannot be used afterwards."""
        self._engine.close()

    def _admit(self) -> None:
        """Submit waiting sequences that fit, in their order."""
        self._budget.begin_step()
        while self._waiting:
            sequence = self._waiting[0]
            cost = self._budget.cost_of(sequence.prompts, sequence.max_tokens)
            if not self._budget.reserve(cost):
                break
            self._waiting.popleft()
            self._running[sequence.sequence_id] = VllmSequence(sequence, cost)
            try:
                self._engine.submit(sequence, self._ends)
            except ValueError as error:
                self._release(sequence.sequence_id)
                refusal = f"the language model refused the request: {error}"
                self._refused.append(SequenceOutput(sequence.sequence_id, 0, error=refusal))

    def _refusal(self, sequence: TokenSequence) -> str | None:
        """Return why this sequence can never be generated, as public text, or None. Compiles a text's grammar."""
        if refusal := sequence.refusal(self._engine.vocabulary, self._engine.context):
            return refusal
        if not self._budget.could_hold(self._budget.cost_of(sequence.prompts, sequence.max_tokens)):
            return f"prompt and text need {sequence.max_length} tokens; the planner's memory is too small"
        return self._start_grammar(sequence)

    def _start_grammar(self, sequence: TokenSequence) -> str | None:
        constraint = sequence.generation.constraint
        if isinstance(constraint, TextConstraint):
            if self._shared.masks is None:
                return "the language model was loaded without its tokenizer: it generates codes only"
            try:
                sequence.text = self._shared.masks.start(constraint.grammar)
            except GrammarRefused as error:
                return f"the grammar is invalid: {error}"
        return None

    def _final_output(self, state: VllmSequence, outputs: Sequence[EngineOutput]) -> SequenceOutput | None:
        """Return the output of a sequence that is finished or void, and remove it; else None."""
        if not outputs and not state.void:
            return None
        sequence_id = state.sequence.sequence_id
        self._engine.abort(state.sequence)  # one request of a broken pair may still be running
        self._release(sequence_id)
        broken = state.out_of_step or len(outputs) != len(state.sequence.prompts) or len(set(outputs)) != 1
        if state.error is not None:
            return SequenceOutput(sequence_id, state.chosen, error=state.error)
        if broken:
            return SequenceOutput(sequence_id, state.chosen, out_of_step=True)
        return self._checked_output(state.sequence, outputs[0])

    def _checked_output(self, sequence: TokenSequence, output: EngineOutput) -> SequenceOutput:
        """Convert vLLM's output. Codes are checked: with logits that are not finite, it generates anything."""
        sequence_id, count = sequence.sequence_id, len(output.tokens)
        if sequence.text is not None:
            if output.stopped:
                return SequenceOutput(sequence_id, count - 1, tokens=output.tokens[:-1])
            if sequence.complete_at_limit:
                return SequenceOutput(sequence_id, count, tokens=output.tokens)
            return SequenceOutput(sequence_id, count, error=f"the text has no end within {sequence.max_tokens} tokens")
        if count != sequence.max_tokens or not all(token in self._shared.codes for token in output.tokens):
            return SequenceOutput(sequence_id, count, error="the language model gave no probabilities")
        return SequenceOutput(sequence_id, count, tokens=output.tokens)

    def _progress(self, state: VllmSequence) -> SequenceOutput | None:
        count = state.chosen - self._engine.ahead
        if count < (state.reported + PROGRESS_EVERY if state.reported else 1):
            return None
        state.reported = count
        return SequenceOutput(state.sequence.sequence_id, count)

    def _release(self, sequence_id: int) -> None:
        self._budget.release(self._running.pop(sequence_id).cost)


def open_vllm(
    model: str, tokenizer: Any, codes: range, size: EngineSize, *, compiled: bool = False, **options: Any
) -> VllmBackend:
    """Load a model from a folder; ``codes`` are the token ids of the audio codes.

    ``tokenizer`` is transformers'; with None, only codes can be generated. ``compiled``: see ``SharedState``.
    ``options`` are vLLM's ``EngineArgs``.

    Raises:
        VllmUnavailable: vLLM is missing, of an untested version, or short of memory.
        OSError: the folder has no configuration.
    """
    vllm_engine.prepare()
    from acestep_consumer.engine.planner.vllm_guidance import processor_for  # noqa: PLC0415 - it imports vLLM, which needs ``prepare`` first

    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    masks = None if tokenizer is None else TokenMasks(tokenizer, vocabulary, end_tokens(tokenizer, _more_ends(model)))
    shared = SharedState({}, range(vocabulary), codes, masks, compiled)
    return VllmBackend(vllm_engine.start(model, processor_for(shared), size, shared.wanted, **options), shared)


def _more_ends(model: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return None
