# SPDX-License-Identifier: Apache-2.0
"""The tiny language model's vocabulary, made once."""

import pytest

from acestep_consumer.engine import tiny_lm
from acestep_consumer.engine.planner.tokens import LmTokens


@pytest.fixture(scope="session")
def tokens() -> LmTokens:
    """Bytes, a few pairs, control tokens, and 64,000 audio codes."""
    return LmTokens(tiny_lm.make_tokenizer())
