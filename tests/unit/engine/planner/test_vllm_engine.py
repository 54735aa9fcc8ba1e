# SPDX-License-Identifier: Apache-2.0
"""Parts of the vLLM engine that need no vLLM."""

import pytest
from transformers import Qwen3Config

from acestep_consumer.engine.planner.vllm_engine import EngineSize, with_prefix
from acestep_consumer.policy.benchmarks import LM_SIZES
from acestep_consumer.policy.sizing import LmSpec
from acestep_consumer.policy.tiers import LMS


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


@pytest.mark.parametrize(("memory_gb", "rows"), [(12, 128), (27, 128), (54, 256)])
def test_an_engine_has_more_rows_where_more_than_64_long_songs_fit(memory_gb: float, rows: int) -> None:
    lm_1_7b = Qwen3Config(num_hidden_layers=28, num_key_value_heads=8, head_dim=128)
    assert EngineSize.on_gpu(memory_gb, lm_1_7b) == EngineSize(memory_gb=memory_gb, rows=rows)
    # plan counts as many: two rows are a song.
    lm = LmSpec(model=LMS[1], backend="vllm", memory=int(memory_gb * 1e9), size=LM_SIZES[LMS[1]])
    assert lm.most_songs == rows // 2
