# SPDX-License-Identifier: Apache-2.0
"""Parts of the vLLM engine that need no vLLM."""

import pytest

from acestep_consumer.engine.planner.vllm_engine import with_prefix


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_tensors_name_gets_the_prefix_of_a_model_with_a_head_once(name: str, full: str) -> None:
    assert with_prefix(name) == full
