# SPDX-License-Identifier: Apache-2.0
"""Suppresses progress bars and irrelevant warnings while models are loaded or saved."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from acestep_consumer.engine.renderer.lyrics.lyric_alignment import CONFIG

_CONFIGS = logging.getLogger("diffusers.configuration_utils")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is about something else than the field of a config that diffusers does not know, and we read."""
    return CONFIG not in record.getMessage()


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress bars, and no warning that diffusers' VAE uses torch's old ``weight_norm``.

    Nor one about alignment heads in a DiT's config.
    """
    loggings = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in loggings:
        each.disable_progress_bar()
    _CONFIGS.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
            yield
    finally:
        _CONFIGS.removeFilter(_is_news)
        for each in loggings:
            each.enable_progress_bar()
