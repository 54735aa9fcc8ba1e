# SPDX-License-Identifier: Apache-2.0
"""Suppresses progress bars and irrelevant warnings while models are loaded or saved."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress bars, and no warning that diffusers' VAE uses torch's old ``weight_norm``."""
    loggings = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in loggings:
        each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
            yield
    finally:
        for each in loggings:
            each.enable_progress_bar()
