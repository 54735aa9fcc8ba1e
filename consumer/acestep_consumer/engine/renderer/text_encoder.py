# SPDX-License-Identifier: Apache-2.0
"""Text encoding: the text encoder and the lyric encoder, for the texts of many jobs at once.

Texts are padded to a rectangle. The text encoder is causal, so that padding at the end changes nothing before it; the
lyric encoder gets a mask.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.denoising.cuda_graphs import GraphedShapes
from acestep_consumer.engine.renderer.denoising.pack import on_device
from acestep_consumer.engine.renderer.prepare import TokenizedText

Encode = Callable[..., torch.Tensor]
States = tuple[torch.Tensor, torch.Tensor]
"""Encoded prompt and encoded lyrics, [tokens, width] each."""

MAX_ROWS = 16
# A graph is for one shape: padding to few row counts and few lengths keeps the graphs few. Long texts take longer to
# compute than to launch, and get none.
_ROWS, _TOKENS, _MAX_GRAPHED_TOKENS = (1, 2, 4, 8, 16), 64, 8192


class TextEncoder:
    """Encodes prompts and lyrics with one model.

    Args:
        parts: the model's components.
        graphed: replay the encoders as CUDA graphs; for CUDA devices only.
    """

    def __init__(self, parts: Components, *, graphed: bool = False) -> None:
        self._parts = parts
        self._pipeline = parts.pipeline
        self._graphs = (GraphedShapes(self._text), GraphedShapes(self._lyrics)) if graphed else None

    def encode(self, texts: Sequence[TokenizedText]) -> Iterator[States]:
        """Yield the encoded states of each text, in order."""
        for start in range(0, len(texts), MAX_ROWS):
            yield from self._encode_batch(texts[start : start + MAX_ROWS])

    def clear_graphs(self) -> None:
        """Free the CUDA graphs; they are captured again when needed."""
        for graphs in self._graphs or ():
            graphs.clear()

    def disable_graphs(self) -> None:
        """Use no more CUDA graphs: the weights will move."""
        self._graphs = None

    def _encode_batch(self, texts: Sequence[TokenizedText]) -> Iterator[States]:
        ids, lyric_ids = (self._padded([each.text for each in texts]), self._padded([each.lyrics for each in texts]))
        lyric_counts = torch.tensor([len(each.lyrics) for each in texts] + [1] * (len(ids) - len(texts)))
        mask = on_device(torch.arange(lyric_ids.shape[1]) < lyric_counts[:, None], self._parts.device)
        encoder = self._parts.use(self._pipeline.text_encoder)
        text = self._run(0, self._text, ids)
        embedded = encoder.get_input_embeddings()(lyric_ids)
        text = self._parts.use(self._pipeline.condition_encoder).text_projector(text)
        lyrics = self._run(1, self._lyrics, embedded, mask)
        for row, each in enumerate(texts):
            # Copies: a graph's output is overwritten by its next replay.
            yield text[row, : len(each.text)].clone(), lyrics[row, : len(each.lyrics)].clone()

    def _padded(self, ids: Sequence[list[int]]) -> torch.Tensor:
        """Return [rows, tokens] on the device."""
        padded = pad_sequence([torch.tensor(each) for each in ids], batch_first=True)
        if self._graphs:
            rows = _ROWS[bisect_left(_ROWS, len(ids))]
            tokens = -(-padded.shape[1] // _TOKENS) * _TOKENS
            padded = torch.nn.functional.pad(padded, (0, tokens - padded.shape[1], 0, rows - len(ids)))
        return on_device(padded, self._parts.device)

    def _run(self, which: int, function: Encode, *inputs: torch.Tensor) -> torch.Tensor:
        rows, tokens = inputs[0].shape[:2]
        if self._graphs and rows * tokens <= _MAX_GRAPHED_TOKENS:
            return self._graphs[which](*inputs)
        return function(*inputs)

    def _text(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._pipeline.text_encoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _lyrics(self, embedded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        encoder: Any = self._pipeline.condition_encoder.lyric_encoder
        states: torch.Tensor = encoder(inputs_embeds=embedded, attention_mask=mask)
        return states
