# SPDX-License-Identifier: Apache-2.0
"""Resources that all jobs of a renderer share: the scheduler of the device, decoders of inputs, encoders of songs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from acestep_consumer.audio import codec
from acestep_consumer.audio.encoding.pool import EncoderPool, Measure, raise_if
from acestep_consumer.audio.measures import measures_of
from acestep_consumer.audio.time_warping import Warp, warped
from acestep_consumer.concurrency.slots import RankedSlots
from acestep_consumer.engine.renderer.scheduler import Scheduler
from acestep_consumer.policy.scoring import BUILT_IN, ScoreTable
from acestep_consumer.policy.tiers import MAX_DURATION_S

Stopped = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class RenderResources:
    """Shared by all jobs.

    Attributes:
        scheduler: makes the songs.
        max_input_s: longest accepted input, seconds.
        decoders: held while an input is decoded; None: any number are decoded at a time.
        encoders: encode and measure the songs; None: this process does.
        tags: whether files say what they are.
        scores: weighs the measures of candidates.
        keep_latents: whether the songs' final latents are written beside them.
    """

    scheduler: Scheduler
    max_input_s: float = MAX_DURATION_S
    decoders: RankedSlots | None = None
    encoders: EncoderPool | None = None
    tags: bool = True
    scores: ScoreTable = BUILT_IN
    keep_latents: bool = False

    def decode(self, path: Path, sample_rate: int, what: str, stopped: Stopped, rank: float) -> codec.Samples:
        """Decode one input, as ``audio.codec.decode`` does, when a decoder is free, by rank."""
        decoders = self.decoders
        with nullcontext() if decoders is None else decoders.held(rank, lambda: raise_if(stopped)):
            return codec.decode(path, sample_rate=sample_rate, max_seconds=self.max_input_s, what=what, stopped=stopped)

    def encoder(self, stopped: Stopped, rank: float) -> AbstractContextManager[codec.Encode]:
        """Wait for an encoder, by rank; the value of the context is the function that encodes, as ``codec.encode``."""
        return nullcontext(codec.encode) if self.encoders is None else self.encoders.slot(stopped, rank)

    def measurer(self, stopped: Stopped, rank: float) -> AbstractContextManager[Measure]:
        """Wait for an encoder, by rank; the value of the context is the function that measures, as ``measures_of``."""
        return nullcontext(measures_of) if self.encoders is None else self.encoders.measurer(stopped, rank)

    def warper(self, stopped: Stopped, rank: float) -> AbstractContextManager[Warp]:
        """Wait for an encoder, by rank; the value of the context is the function that aligns lyrics, as ``warped``."""
        return nullcontext(warped) if self.encoders is None else self.encoders.warper(stopped, rank)
