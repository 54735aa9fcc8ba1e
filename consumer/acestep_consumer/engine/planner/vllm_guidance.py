# SPDX-License-Identifier: Apache-2.0
"""What decides each next token inside vLLM: guidance, grammar and the seeded draw, as a logits processor of its own.

vLLM calls it once a step with the logits of every request. A guided song is two requests, one for each prompt. The
processor takes the two rows together, chooses one token for both, and makes that token the likeliest of either row, so
that vLLM's own sampling, told to be greedy, has nothing left to decide. vLLM's own ways (a list of allowed tokens per
request, top-p over the whole vocabulary, a generator per request) cost more than the model does.

A pair is in step as long as its rows have the same tokens. The processor compares them at every step; a pair that is
not in step is void, and nothing is chosen for it any more.

Written for vLLM's public interface for batches (``vllm.v1.sample.logits_processor``), which the V1 model runner calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from acestep_consumer.engine.planner.guidance import Rows, choose, guide
from acestep_consumer.engine.planner.token_masks import TokenMasks, masked
from acestep_consumer.engine.planner.vllm_sequence import SharedState, VllmSequence

CERTAIN = 1e30
"""A logit above all that a model gives: whoever takes the likeliest token takes this one."""


class BatchRow(NamedTuple):
    """A row of vLLM's batch. ``branch`` 0 is the prompt, 1 the unconditional one; ``written`` is vLLM's own list."""

    draft: VllmSequence
    branch: int
    written: list[int]


def processor_for(stage: SharedState) -> type["GuidanceProcessor"]:
    """A processor class for this stage. vLLM makes the instance itself, so what it shares has to be in the class."""
    return type("StagedGuidanceProcessor", (GuidanceProcessor,), {"stage": stage})


class GuidanceProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is Any to mypy: it is not there where mypy runs
    """Chooses for all rows of the batch. Use ``processor_for``: a bare one has no stage."""

    stage: ClassVar[SharedState]

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002, FBT001 - vLLM calls it so
        self._device = torch.device(device)
        self._seats: dict[int, BatchRow] = {}
        self._groups: list[GuidanceGroup] | None = None
        # Texts are few and short, and their masks come from the host.
        self._decide_codes: Decide = torch.compile(decide) if self.stage.compiled else decide

    def is_argmax_invariant(self) -> bool:
        """No: greedy sampling has to see what it does."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows as requests come, go and change places; vLLM asks for this order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._seats.pop(row, None)
        for row, params, _, written in batch_update.added:
            self._sit(row, params.extra_args or {}, written)
        for source, target, direction in batch_update.moved:
            self._move(source, target, swap=direction == MoveDirectionality.SWAP)
        self._groups = None

    def apply(self, logits: Tensor) -> Tensor:
        """Choose for every row, without waiting for the device; ``logits`` [rows, vocabulary] are changed in place."""
        if self._groups is None or not all(group.in_step for group in self._groups):
            self._groups = self._compose()
        for group in self._groups:
            group.choose(logits)
        return logits

    def _sit(self, row: int, tags: Mapping[str, int], written: list[int]) -> None:
        draft = self.stage.drafts.get(tags.get("song", -1))
        if draft is None:  # dropped in the meantime, or one of vLLM's own warm-up requests
            self._seats.pop(row, None)
        else:
            self._seats[row] = BatchRow(draft, tags["branch"], written)

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        moved, displaced = self._seats.pop(source, None), self._seats.pop(target, None)
        if moved is not None:
            self._seats[target] = moved
        if swap and displaced is not None:
            self._seats[source] = displaced

    def _compose(self) -> list["GuidanceGroup"]:
        """Leave out who is not in step; group the others by the part of the vocabulary that they choose from."""
        pairs: dict[VllmSequence, dict[int, int]] = {}
        for row, seat in self._seats.items():
            if not seat.draft.done:
                pairs.setdefault(seat.draft, {})[seat.branch] = row
        codes: list[SequenceRows] = []
        texts: list[SequenceRows] = []
        for draft, rows in pairs.items():
            couple = SequenceRows(draft, rows, [self._seats[row].written for row in rows.values()])
            couple.follow()
            if draft.done:
                continue
            if couple.in_step:
                (codes if draft.song.text is None else texts).append(couple)
            else:
                draft.out_of_step = True
        groups = [GuidanceGroup(codes, self.stage.codes, None, self._decide_codes, self._device)] if codes else []
        return (
            [*groups, GuidanceGroup(texts, self.stage.tokens, self.stage.masks, decide, self._device)]
            if texts
            else groups
        )


class SequenceRows:
    """The rows of one song: two when it is guided, else one."""

    __slots__ = ("_expected", "_first", "_last", "conditional", "draft", "unconditional", "written")

    def __init__(self, draft: VllmSequence, rows: Mapping[int, int], written: Sequence[list[int]]) -> None:
        self.draft = draft
        self.written = written[0]
        self.conditional = rows.get(0, -1)
        # A song without guidance is its own unconditional.
        self.unconditional = rows.get(1, self.conditional)
        self._first, self._last = written[0], written[-1]
        self._expected = len(rows) == len(draft.song.prompts)

    def follow(self) -> None:
        """Let the grammar of a text read what has been written since.

        vLLM may be a step ahead of a text's end: what it writes after that is for nobody.
        """
        draft, text = self.draft, self.draft.song.text
        while text is not None and draft.read < len(self.written) and not draft.done:
            try:
                draft.ended = text.accept(self.written[draft.read])
            except ValueError:
                draft.error = "the language model gave no probabilities"
            draft.read += 1

    @property
    def in_step(self) -> bool:
        """Whether all its rows are there and have what was chosen for them, token for token."""
        first, last, chosen = self._first, self._last, self.draft.chosen
        return self._expected and len(first) == len(last) == chosen and first[-1:] == last[-1:]


@dataclass(frozen=True, slots=True, eq=False)
class GroupTensors:
    """What the device knows of songs that choose from one part of the vocabulary.

    ``pairs`` int64 [2, songs]: the conditional and the unconditional row of each. ``steps`` int64 [songs] and ``seen``
    bool [songs, ids] are as ``choose`` takes them; ``first`` is the first of the ids.
    """

    pairs: Tensor
    sampling: Rows
    steps: Tensor
    seen: Tensor | None
    first: int

    @classmethod
    def of(cls, couples: Sequence[SequenceRows], ids: range, device: torch.device) -> Self:
        """Send it to the device."""
        sampling = Rows.of((couple.draft.song.generation.sampling for couple in couples), device)
        rows = [[couple.conditional for couple in couples], [couple.unconditional for couple in couples]]
        return cls(
            pairs=torch.tensor(rows, device=device),
            sampling=sampling,
            steps=torch.tensor([couple.draft.chosen for couple in couples], device=device),
            seen=_seen(couples, ids).to(device) if sampling.penalised else None,
            first=ids.start,
        )


def decide(part: Tensor, choice: GroupTensors, allowed: Tensor | None = None) -> Tensor:
    """The next token of every song; columns of ``part`` [rows, ids], int64 [songs].

    ``allowed`` int32 [songs, words]: what may come next; None is everything.
    """
    guided = guide(part[choice.pairs[0]], part[choice.pairs[1]], choice.sampling.scale)
    logits = guided if allowed is None else masked(guided, allowed)
    return choose(logits, choice.sampling, choice.steps, choice.seen, choice.first)


Decide = Callable[[Tensor, GroupTensors, Tensor | None], Tensor]


class GuidanceGroup:
    """Songs that choose from one part of the vocabulary.

    It is built when rows come, go or move, and carried on from step to step in between.
    """

    def __init__(
        self,
        couples: Sequence[SequenceRows],
        ids: range,
        masks: TokenMasks | None,
        decide: Decide,
        device: torch.device,
    ) -> None:
        """``masks`` are for texts."""
        self._couples = couples
        self._ids = ids
        self._decide = decide
        self._choice = GroupTensors.of(couples, ids, device)
        self._table = masks.table(len(couples), device) if masks else None
        self._certain = torch.tensor(CERTAIN, device=device)

    @property
    def in_step(self) -> bool:
        """Whether all its songs are."""
        return all(couple.in_step for couple in self._couples)

    def choose(self, logits: Tensor) -> None:
        """Choose every song's next token and make it certain in its rows of ``logits`` [rows, vocabulary]."""
        allowed = None if self._table is None else self._allowed(self._table)
        columns = self._decide(logits[:, self._ids.start : self._ids.stop], self._choice, allowed)
        if self._choice.seen is not None:
            self._choice.seen.scatter_(1, columns[:, None], value=True)
        self._choice.steps.add_(1)
        logits[self._choice.pairs, columns + self._ids.start] = self._certain
        for couple in self._couples:
            couple.draft.chosen += 1

    def _allowed(self, table: Tensor) -> Tensor:
        """Look up what the grammars allow, while the device is still busy with the model; int32 [songs, words].

        The table on the host is written again one step later, and vLLM waits for a step's tokens before it starts the
        processors of the next: the copy is over by then. A text that has ended keeps its last mask.
        """
        for row, couple in enumerate(self._couples):
            couple.follow()
            if couple.draft.song.text is not None and not couple.draft.done:
                couple.draft.song.text.fill(table, row)
        return table.to(self._choice.pairs.device, non_blocking=True)


def _seen(couples: Sequence[SequenceRows], ids: range) -> Tensor:
    """Which of the tokens ``ids`` are in each song's prompt or have been written; bool [songs, ids]."""
    known = [{*couple.draft.song.generation.prompt, *couple.written} for couple in couples]
    seen = torch.zeros(len(known), len(ids), dtype=torch.bool)
    for row, tokens in enumerate(known):
        seen[row, [token - ids.start for token in tokens if token in ids]] = True
    return seen
