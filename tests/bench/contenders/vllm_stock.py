# SPDX-License-Identifier: Apache-2.0
"""Guided songs on vLLM with its own means: what the vLLM backend is measured against.

Every request has the codes as its list of allowed tokens, a top-p and a seed, and vLLM samples. A processor adds only
what vLLM lacks: it puts the guided logits into both rows of a pair. Both rows then draw with the same seed.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from acestep_consumer.engine.planner.backend import Generation
from acestep_consumer.engine.planner.sequence import TokenSequence


class StockGuidance(LogitsProcessor):  # type: ignore[misc]  # vLLM is Any to mypy: it is not there where mypy runs
    """Guidance and nothing else."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:  # noqa: FBT001 - vLLM calls it so
        self._rows: dict[int, tuple[int, int, float]] = {}

    def is_argmax_invariant(self) -> bool:
        """No: it changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, _ in batch_update.added:
            tags = params.extra_args or {}
            self._rows[row] = (tags.get("song", -1), tags.get("branch", 0), tags.get("scale", 1.0))
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source), self._rows.pop(target, None)
            self._rows[target] = moved
            if direction == MoveDirectionality.SWAP and displaced is not None:
                self._rows[source] = displaced

    def apply(self, logits: Tensor) -> Tensor:
        """Put u + s (c − u) into both rows of every pair."""
        pairs: dict[int, dict[int, tuple[int, float]]] = {}
        for row, (song, branch, scale) in self._rows.items():
            pairs.setdefault(song, {})[branch] = (row, scale)
        whole = [(pair[0][0], pair[1][0], pair[0][1]) for pair in pairs.values() if len(pair) == 2]
        if whole:
            conditional, unconditional, scale = torch.tensor(whole, device=logits.device).T
            c, u = logits[conditional.long()], logits[unconditional.long()]
            guided = torch.where(c.isneginf(), c, u + scale[:, None] * (c - u))
            logits[conditional.long()] = guided
            logits[unconditional.long()] = guided
        return logits


def submit(engine: Any, number: int, generation: Generation, codes: range) -> None:
    """Hand in both requests of a song."""
    song, sampling = TokenSequence(number, generation), generation.sampling
    for branch, prompt in enumerate(song.prompts):
        parameters = SamplingParams(
            max_tokens=song.max_tokens,
            ignore_eos=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            allowed_token_ids=list(codes),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"song": number, "branch": branch, "scale": sampling.cfg_scale},
        )
        engine.add_request(f"{number}.{branch}", {"type": "token", "prompt_token_ids": list(prompt)}, parameters)
