# SPDX-License-Identifier: Apache-2.0
"""Guidance inside vLLM: a logits processor that applies guidance and grammar, and chooses each next token.

vLLM calls it once a step with the logits of every request. A guided sequence is two requests, one for each prompt. The
processor combines the two rows, chooses one token for both, and makes that token the likeliest of either row, so that
vLLM's own sampling, set to greedy, has nothing left to decide. vLLM's own features (a list of allowed tokens per
request, top-p over the whole vocabulary, a generator per request) cost more than the model does.

A pair is in step as long as its rows have the same tokens. The processor compares them at every step; a pair that is
not in step is void, and gets no further token.

Written for vLLM's public interface for batches (``vllm.v1.sample.logits_processor``), which the V1 model runner calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self

import structlog
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from acestep_consumer.engine.captured_graph import CapturedGraph, pool_of
from acestep_consumer.engine.planner.guidance import RowSampling, choose, guide, seen_tokens
from acestep_consumer.engine.planner.token_masks import TokenMasks, masked
from acestep_consumer.engine.planner.vllm_sequence import SharedState, VllmSequence

CERTAIN = 1e30
"""A logit above any of a model: greedy sampling takes this token."""

_GRAPHED_SEQUENCES = 8
"""With more, the device takes longer for a step than the host, and a graph would gain nothing."""

_GRAPH_AFTER = 16
"""Steps of the same rows before a graph is captured, which takes the time of several."""

log = structlog.get_logger()


class BatchRow(NamedTuple):
    """A row of vLLM's batch. ``branch`` 0 is the prompt, 1 the unconditional one; ``output`` is vLLM's own list."""

    state: VllmSequence
    branch: int
    output: list[int]


def processor_for(shared: SharedState) -> type["GuidanceProcessor"]:
    """Return a processor class for this state. vLLM makes the instance itself, so that the class has to carry it."""
    return type("SharedGuidanceProcessor", (GuidanceProcessor,), {"shared": shared})


class GuidanceProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is Any to mypy: it is not installed where mypy runs
    """Chooses the tokens of all rows of the batch. Use ``processor_for``: the bare class has no shared state."""

    shared: ClassVar[SharedState]

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002, FBT001 - vLLM's signature
        self._device = torch.device(device)
        self._rows: dict[int, BatchRow] = {}
        self._groups: list[GuidanceGroup] | None = None
        # Texts are few and short, and their masks come from the host.
        self._choose_codes: ChooseTokens = torch.compile(choose_tokens) if self.shared.compiled else choose_tokens

    def is_argmax_invariant(self) -> bool:
        """Return False: the processor changes the result of greedy sampling."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that are removed, added and moved, in vLLM's required order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output in batch_update.added:
            self._add(row, params.extra_args or {}, output)
        for source, target, direction in batch_update.moved:
            self._move(source, target, swap=direction == MoveDirectionality.SWAP)
        self._groups = None

    def apply(self, logits: Tensor) -> Tensor:
        """Choose for every row, without waiting for the device; ``logits`` [rows, vocabulary] are changed in place."""
        if self._groups is None or not all(group.in_step for group in self._groups):
            self._groups = self._grouped()
        for group in self._groups:
            group.choose(logits)
        return logits

    def _add(self, row: int, tags: Mapping[str, int], output: list[int]) -> None:
        state = self.shared.running.get(tags.get("sequence", -1))
        if state is None:  # dropped in the meantime, or one of vLLM's own warm-up requests
            self._rows.pop(row, None)
        else:
            self._rows[row] = BatchRow(state, tags["branch"], output)

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if swap and displaced is not None:
            self._rows[source] = displaced

    def _grouped(self) -> list["GuidanceGroup"]:
        """Leave out sequences that are not in step; group the others by the part of the vocabulary that they use."""
        rows_of: dict[VllmSequence, dict[int, int]] = {}
        for index, row in self._rows.items():
            if not row.state.done:
                rows_of.setdefault(row.state, {})[row.branch] = index
        codes: list[SequenceRows] = []
        texts: list[SequenceRows] = []
        for state, branches in rows_of.items():
            rows = SequenceRows(state, branches, [self._rows[index].output for index in branches.values()])
            rows.advance_grammar()
            if state.done:
                continue
            if rows.in_step:
                (codes if state.sequence.text is None else texts).append(rows)
            else:
                state.out_of_step = True
        shared, groups = self.shared, list[GuidanceGroup]()
        if codes:
            groups.append(GuidanceGroup(codes, shared.codes, None, self._choose_codes, self._device))
        if texts:
            groups.append(GuidanceGroup(texts, shared.tokens, shared.masks, choose_tokens, self._device))
        return groups


class SequenceRows:
    """The rows of one sequence: two when it is guided, else one."""

    __slots__ = ("_expected", "_first", "_last", "conditional", "output", "state", "unconditional")

    def __init__(self, state: VllmSequence, branches: Mapping[int, int], outputs: Sequence[list[int]]) -> None:
        """``branches``: row by branch; ``outputs``: vLLM's output lists of these rows."""
        self.state = state
        self.output = outputs[0]
        self.conditional = branches.get(0, -1)
        # Without guidance a sequence is its own unconditional branch.
        self.unconditional = branches.get(1, self.conditional)
        self._first, self._last = outputs[0], outputs[-1]
        self._expected = len(branches) == len(state.sequence.prompts)

    def advance_grammar(self) -> None:
        """Let a text's grammar accept the tokens that were added since the last call.

        vLLM may be a step ahead of a text's end: tokens after it are ignored.
        """
        state, text = self.state, self.state.sequence.text
        while text is not None and state.read < len(self.output) and not state.done:
            try:
                state.ended = text.accept(self.output[state.read])
            except ValueError:
                state.error = "the language model gave no probabilities"
            state.read += 1

    @property
    def in_step(self) -> bool:
        """Whether all its rows are there and have exactly the tokens that were chosen for them."""
        first, last, chosen = self._first, self._last, self.state.chosen
        return self._expected and len(first) == len(last) == chosen and first[-1:] == last[-1:]


@dataclass(frozen=True, slots=True, eq=False)
class GroupTensors:
    """State on the device of sequences that choose from the same part of the vocabulary.

    ``pairs`` int64 [2, sequences]: the conditional and the unconditional row of each. ``steps`` int64 [sequences] and
    ``seen`` bool [sequences, ids] are arguments of ``choose``; ``first`` is the first of the ids.
    """

    pairs: Tensor
    sampling: RowSampling
    steps: Tensor
    seen: Tensor | None
    first: int

    @classmethod
    def of(cls, sequences: Sequence[SequenceRows], ids: range, device: torch.device) -> Self:
        """Copy the state of these sequences to the device."""
        sampling = RowSampling.of((rows.state.sequence.generation.sampling for rows in sequences), device)
        seen = None
        if sampling.penalised:
            known = [{*rows.state.sequence.generation.prompt, *rows.output} for rows in sequences]
            seen = seen_tokens(known, ids).to(device)
        pairs = [[rows.conditional for rows in sequences], [rows.unconditional for rows in sequences]]
        return cls(
            pairs=torch.tensor(pairs, device=device),
            sampling=sampling,
            steps=torch.tensor([rows.state.chosen for rows in sequences], device=device),
            seen=seen,
            first=ids.start,
        )


def choose_tokens(logits: Tensor, tensors: GroupTensors, allowed: Tensor | None = None) -> Tensor:
    """Return the next token of every sequence, as columns of ``logits`` [rows, ids]; int64 [sequences].

    ``allowed`` int32 [sequences, words]: the grammars' masks; None allows everything.
    """
    guided = guide(logits[tensors.pairs[0]], logits[tensors.pairs[1]], tensors.sampling.scale)
    final = guided if allowed is None else masked(guided, allowed)
    return choose(final, tensors.sampling, tensors.steps, tensors.seen, tensors.first)


ChooseTokens = Callable[[Tensor, GroupTensors, Tensor | None], Tensor]


class GuidanceGroup:
    """Sequences that choose from the same part of the vocabulary, ``ids``; ``masks`` are for texts.

    It is built when rows are added, removed or moved, and updated in place from step to step in between. A few
    sequences without masks are soon chosen for by a CUDA graph: for them the host takes longer than the device.
    """

    _capturable: ClassVar[bool] = True

    def __init__(
        self,
        sequences: Sequence[SequenceRows],
        ids: range,
        masks: TokenMasks | None,
        choose_tokens: ChooseTokens,
        device: torch.device,
    ) -> None:
        self._sequences = sequences
        self._ids = ids
        self._choose_tokens = choose_tokens
        self._tensors = GroupTensors.of(sequences, ids, device)
        self._mask_table = masks.table(len(sequences), device) if masks else None
        self._certain = torch.tensor(CERTAIN, device=device)
        self._graphed = masks is None and _worth_a_graph(device, len(sequences))
        self._steps = 0
        self._graph: CapturedGraph | None = None

    @property
    def in_step(self) -> bool:
        """Whether all its sequences are."""
        return all(rows.in_step for rows in self._sequences)

    def choose(self, logits: Tensor) -> None:
        """Choose every sequence's next token and make it certain in its rows of ``logits`` [rows, vocabulary]."""
        if self._graph is not None:
            columns = self._graph(logits)
        else:
            columns = self._next(logits, None if self._mask_table is None else self._allowed(self._mask_table))
        logits[self._tensors.pairs, columns + self._ids.start] = self._certain
        for rows in self._sequences:
            rows.state.chosen += 1
        self._steps += 1
        if self._graphed and self._steps == _GRAPH_AFTER and GuidanceGroup._capturable:
            try:
                self._graph = self._captured(logits)
            except RuntimeError as error:
                GuidanceGroup._capturable = False
                log.warning("codes are chosen without a CUDA graph, which is slower: it fails", exc_info=error)

    def _next(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the next tokens as columns of the group's part of the vocabulary, and count them."""
        columns = self._choose_tokens(logits[:, self._ids.start : self._ids.stop], self._tensors, allowed)
        if self._tensors.seen is not None:
            self._tensors.seen.scatter_(1, columns[:, None], value=True)
        self._tensors.steps.add_(1)
        return columns

    def _captured(self, logits: Tensor) -> CapturedGraph:
        """Return a graph of ``_next``. Nothing is computed: what is captured does not run."""
        current, stream = torch.cuda.current_stream(), _capture_stream(logits.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # the default stream cannot be captured
            graph = CapturedGraph(self._next, (logits,), pool_of(logits.device))
        current.wait_stream(stream)
        return graph

    def _allowed(self, table: Tensor) -> Tensor:
        """Return the grammars' masks, computed while the device is busy with the model; int32 [sequences, words].

        The table on the host is written again one step later, and vLLM waits for a step's tokens before it calls the
        processors of the next: the copy is finished by then. A text that has ended keeps its last mask.
        """
        for index, rows in enumerate(self._sequences):
            rows.advance_grammar()
            if rows.state.sequence.text is not None and not rows.state.done:
                rows.state.sequence.text.fill(table, index)
        return table.to(self._tensors.pairs.device, non_blocking=True)


def _worth_a_graph(device: torch.device, sequences: int) -> bool:
    return device.type == "cuda" and sequences <= _GRAPHED_SEQUENCES


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures: memory is used again on its own stream alone."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
