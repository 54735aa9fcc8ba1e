# SPDX-License-Identifier: Apache-2.0
"""The garbage collector of a process that runs tests: what lives when they begin is kept from it (``gc.freeze``)."""

import gc


def freeze_the_living() -> None:
    """Freeze what is alive, and collect what is not: code under test froze garbage of a test, too."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
