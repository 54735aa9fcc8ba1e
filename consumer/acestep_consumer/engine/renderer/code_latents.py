# SPDX-License-Identifier: Apache-2.0
"""Latents of audio codes: the detokenizer's output for each code, computed once and looked up afterwards.

The detokenizer treats each code by itself, so that what it makes of the 64,000 codes of the codebook is a table: 41 MB
for 64 channels in bfloat16. Making it takes a GPU as long as the codes of some forty songs of five minutes, a second on
most; looking up is one kernel where computing is two hundred.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.denoising.pack import on_device

_CODES_AT_ONCE: Final = 2000  # a quarter of a GB while they are computed


class CodeLatents:
    """Latents of the audio codes of one model.

    Args:
        parts: the model's components.
        tabulated: compute all codes at the first use; for GPUs, since a processor takes minutes.
    """

    def __init__(self, parts: Components, *, tabulated: bool) -> None:
        self._parts = parts
        self._pipeline = parts.pipeline
        self._tabulated = tabulated
        self._table: torch.Tensor | None = None

    def of(self, codes: Sequence[list[int]]) -> Iterator[torch.Tensor]:
        """Yield the latents that each song's codes stand for, [frames, channels]."""
        if not codes:
            return
        joined = on_device(torch.tensor([code for some in codes for code in some]), self._parts.device)
        latents = self._looked_up(joined) if self._tabulated else self._computed(joined)
        frames = self._pipeline.audio_token_detokenizer.pool_window_size
        yield from torch.split(latents, [frames * len(some) for some in codes])

    def warm_up(self) -> None:
        """Make the table, where there is to be one and the model has codes."""
        if self._tabulated and self._pipeline.audio_tokenizer is not None:
            self._looked_up(torch.zeros(1, dtype=torch.int64, device=self._parts.device))

    def _looked_up(self, codes: torch.Tensor) -> torch.Tensor:
        if self._table is None:
            self._table = self._all()
        return self._table[codes].flatten(0, 1)

    def _all(self) -> torch.Tensor:
        """Return the latents of the whole codebook, [codes, frames of a code, channels]."""
        count: int = self._pipeline.audio_tokenizer.quantizer.codebook_size
        codes = torch.arange(count, device=self._parts.device)
        latents = torch.cat([self._computed(some) for some in torch.split(codes, _CODES_AT_ONCE)])
        return latents.reshape(count, -1, latents.shape[-1])

    def _computed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the latents of codes, [frames, channels], by quantizer and detokenizer."""
        tokenizer, detokenizer = self._pipeline.audio_tokenizer, self._pipeline.audio_token_detokenizer
        quantizer = self._parts.use(tokenizer).quantizer
        quantized = quantizer.get_output_from_indices(codes[None, :, None]).to(self._parts.dtype)
        latents: torch.Tensor = self._parts.use(detokenizer)(quantized)[0].to(self._parts.dtype)
        return latents
