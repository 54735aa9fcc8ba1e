# SPDX-License-Identifier: Apache-2.0
"""How torch compiles here: once for each kind of block, never again for a pack of other lengths."""

import torch

# Two kinds of blocks (with a window and without), for each model and each precision; torch gives up at 8.
_MOST_KINDS = 64


def allow_many_kinds() -> None:
    """Set torch's compiler up. For the thread that will run what is compiled: its settings are per thread."""
    torch._dynamo.config.recompile_limit = _MOST_KINDS  # noqa: SLF001 - torch's documented configuration module
    # Lengths that happen to be equal in one pack would be taken for one and the same length, and differ in the next.
    torch.fx.experimental._config.use_duck_shape = False  # noqa: SLF001 - as above
