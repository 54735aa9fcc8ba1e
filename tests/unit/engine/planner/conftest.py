# SPDX-License-Identifier: Apache-2.0
"""The tiny language model's vocabulary, made once."""

import pytest

from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.testing import tiny_lm


@pytest.fixture(scope="session")
def tokens() -> LmTokens:
    """Bytes, a few pairs, control tokens, and 64,000 audio codes."""
    return LmTokens(tiny_lm.make_tokenizer())
