# SPDX-License-Identifier: Apache-2.0
"""Which packs are stepped by a CUDA graph."""

from types import SimpleNamespace
from typing import Any

import pytest

from acestep_consumer.engine.renderer.cuda_graphs import worth_a_graph
from acestep_consumer.engine.renderer.denoiser import _PackMembers


@pytest.mark.parametrize(
    ("tokens", "steps", "graphed"),
    [
        pytest.param(375, 8, True, id="30 s alone"),
        pytest.param(375, 3, True, id="three steps until one leaves"),
        pytest.param(375, 2, False, id="two steps: launched before they are captured"),
        pytest.param(3750, 8, False, id="300 s: computes longer than it launches"),
    ],
)
def test_a_pack_is_graphed_if_it_is_small_and_stays_for_some_steps(tokens: int, steps: int, *, graphed: bool) -> None:
    assert worth_a_graph(tokens, steps) == graphed


def test_a_pack_stays_until_the_first_of_its_songs_is_denoised() -> None:
    samples: Any = (
        SimpleNamespace(steps=8, step=1),
        SimpleNamespace(steps=8, step=6),
        SimpleNamespace(steps=50, step=0),
    )
    assert _PackMembers(samples, ((), (), ())).steps_left() == 2
