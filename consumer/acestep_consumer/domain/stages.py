# SPDX-License-Identifier: Apache-2.0
"""The stages of a job inside a worker, and what the engines can take at once."""

from dataclasses import dataclass
from typing import Final

from acestep_schemas.events import StageJobs

STAGES: Final = tuple(StageJobs.model_fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapacity:
    """Work that the engines can do at once. None: they do not tell, and nothing waits for room in them.

    Attributes:
        lm_songs: songs that the language model has rows and memory for, as far as it is known.
        lm_waiting: of the songs that it was given, those that wait for its memory.
        pack_s: seconds of audio in one full batch of the renderer.
        encoders: songs that are encoded at once.
    """

    lm_songs: int | None = None
    lm_waiting: int = 0
    pack_s: float | None = None
    encoders: int | None = None
