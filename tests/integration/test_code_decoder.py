# SPDX-License-Identifier: Apache-2.0
"""Audio codes to latents in parts of one shape, as a CUDA graph needs them, against all codes at once."""

from pathlib import Path

import pytest
import torch

from acestep_consumer.engine.renderer import conditioning
from acestep_consumer.engine.renderer.conditioning import CodeDecoder
from acestep_consumer.engine.testing.tiny_checkpoint import TURBO
from tests.support.scheduler_harness import open_runners


@pytest.fixture(scope="module")
def decoder(tiny_checkpoints: Path) -> CodeDecoder:
    return CodeDecoder(open_runners(tiny_checkpoints)[TURBO].parts, graphed=False)


class _Recorded:
    """Stands for a graph, which needs a GPU: records the shapes that it is called with."""

    def __init__(self, decoder: CodeDecoder) -> None:
        self.shapes: list[int] = []
        self._decoder = decoder
        self._output = torch.empty(0)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        self.shapes.append(len(codes))
        found = self._decoder._decoded(codes)
        if self._output.shape != found.shape:
            self._output = torch.empty_like(found)
        # As a graph does: every call has the same memory for its result.
        return self._output.copy_(found)


@pytest.mark.parametrize("lengths", [[1], [8], [3, 4, 1], [5, 30, 2], [16, 8]])
@torch.no_grad()
def test_codes_in_parts_of_one_shape_give_the_same_latents(
    decoder: CodeDecoder, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "_CODES_AT_ONCE", 8)
    songs = [[(37 * length + 11 * index) % 64 for index in range(length)] for length in lengths]
    wanted = list(decoder.latents(songs))
    graph = _Recorded(decoder)
    monkeypatch.setattr(decoder, "_graph", graph)

    found = list(decoder.latents(songs))

    assert [len(each) for each in found] == [5 * length for length in lengths]
    assert set(graph.shapes) == {8}
    assert len(graph.shapes) == -(-sum(lengths) // 8)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


def test_no_codes_are_no_latents(decoder: CodeDecoder) -> None:
    assert list(decoder.latents([])) == []
