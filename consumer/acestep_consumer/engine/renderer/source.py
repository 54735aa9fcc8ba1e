# SPDX-License-Identifier: Apache-2.0
"""Source of a request's songs on the device: latents of its source audio, of its audio codes, or of silence.

As in ACE-Step, the model never works on fewer than 128 frames: a shorter source continues with silence. What is beyond
the length that was asked for is cut off after decoding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from acestep_consumer.domain.tasks import TASKS, ShownSource
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.denoising.pack import on_device
from acestep_consumer.engine.renderer.latents import PlacedLatents
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.window import Window

LEAST_FRAMES: Final = 128


@dataclass(frozen=True, slots=True, eq=False)
class SourceContext:
    """The source of a request's songs.

    Attributes:
        context: what the model sees, source latents and chunk mask: [songs, frames, 2 * channels].
        frames: frames that are asked for; those of ``context`` may be more.
        latents: of the source audio or of its audio codes, [songs, frames, channels]; silence where there is neither.
        kept: the same, where a part of the source audio is to be kept.
        window: the part that is made anew, in frames.
    """

    context: torch.Tensor
    frames: int
    latents: torch.Tensor
    window: Window
    kept: torch.Tensor | None = None


class SourceEncoder:
    """Encodes the sources of one model's requests."""

    def __init__(self, parts: Components) -> None:
        self._parts = parts
        self._pipeline = parts.pipeline

    def encode(
        self, arguments: PipelineArguments, code_latents: Sequence[torch.Tensor], frames: int | None
    ) -> SourceContext:
        """Return the source of a request. The VAE's posterior is sampled with the generators set before.

        ``code_latents``: of each song's audio codes, [frames, channels], or none. ``frames``: None where the source
        audio decides; at least one.
        """
        audio, songs = arguments.src_audio, len(arguments.seeds)
        if code_latents:
            source = torch.stack(list(code_latents))
        elif audio is not None:
            latents = arguments.src_latents
            source = (self._encoded(audio) if latents is None else self._placed(latents)).expand(songs, -1, -1)
        else:
            source = self._silence(max(frames or 0, LEAST_FRAMES)).expand(songs, -1, -1)
        length, source = frames or source.shape[1], self._lengthened(source)
        window = _window(arguments, self._pipeline.latents_per_second, length, source.shape[1])
        kept = source if audio is not None and not code_latents and not window.whole else None
        context = torch.cat([self._seen(arguments, source, window), _mask(arguments, source, window)], dim=-1)
        return SourceContext(context, length, source, window, kept)

    def without_source(self, context: torch.Tensor) -> torch.Tensor:
        """Return ``context``, [songs, frames, 2 * channels], with silence in place of the source."""
        silence, mask = self._silence(context.shape[1]), context[..., context.shape[-1] // 2 :]
        return torch.cat([silence.expand(len(context), -1, -1), mask], dim=-1)

    def _seen(self, arguments: PipelineArguments, source: torch.Tensor, window: Window) -> torch.Tensor:
        """Return what the model sees of the source audio, [songs, frames, channels]."""
        if arguments.src_audio is None or arguments.audio_codes:
            return source
        match TASKS[arguments.task_type].shown:
            case ShownSource.NOTHING:
                return self._silence(source.shape[1]).expand_as(source)
            case ShownSource.CODES:
                return self._tokenized(source)
            case ShownSource.OUTSIDE_WINDOW:
                inside = window.mask(source.device).bool()[:, None]
                return torch.where(inside, self._silence(source.shape[1]), source)
            case ShownSource.WHOLE:
                return source

    def _encoded(self, audio: torch.Tensor) -> torch.Tensor:
        """Return latents of the source audio, one for all songs or one for each: [songs, frames, channels]."""
        latents, _ = self._pipeline.prepare_src_latents(**self._where(), src_audio=audio)
        found: torch.Tensor = latents
        return found

    def _placed(self, latents: PlacedLatents) -> torch.Tensor:
        """Return the source's own latents, [1, frames, channels]: no audio is encoded."""
        values = on_device(latents.values, self._parts.device).to(self._parts.dtype)[None]
        return torch.cat([self._silence(latents.before), values, self._silence(latents.after)], dim=1)

    def _tokenized(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents that the audio codes of ``latents`` stand for: what is left of a song in a cover of it."""
        tokenizer, detokenizer = self._pipeline.audio_tokenizer, self._pipeline.audio_token_detokenizer
        if tokenizer is None or detokenizer is None:
            raise ValueError("this checkpoint has no audio tokenizer, so it cannot make covers")
        silence = self._pipeline.condition_encoder.silence_latent.to(**self._where())
        quantized, _ = self._parts.use(tokenizer).tokenize(latents, silence)
        heard: torch.Tensor = self._parts.use(detokenizer)(quantized.to(**self._where()))
        return heard[:, : latents.shape[1]]

    def _silence(self, frames: int) -> torch.Tensor:
        """Return latents of silence, [1, frames, channels]."""
        silence: torch.Tensor = self._pipeline.condition_encoder.silence_latent.to(**self._where())
        return silence.repeat(1, math.ceil(frames / silence.shape[1]), 1)[:, :frames]

    def _lengthened(self, source: torch.Tensor) -> torch.Tensor:
        missing = LEAST_FRAMES - source.shape[1]
        if missing <= 0:
            return source
        return torch.cat([source, self._silence(missing).expand(len(source), -1, -1)], dim=1)

    def _where(self) -> dict[str, Any]:
        return {"device": self._parts.device, "dtype": self._parts.dtype}


def _window(arguments: PipelineArguments, rate: float, length: int, padded: int) -> Window:
    """Return the part that is made anew; silence after a short source belongs to it where the source's end does."""
    window = Window.of(arguments.repainting_start, arguments.repainting_end, rate, length)
    return Window(window.start, padded if window.end == length else window.end, padded)


def _mask(arguments: PipelineArguments, source: torch.Tensor, window: Window) -> torch.Tensor:
    """Return the chunk mask, like ``source``: the part to make (explicit), or ones: the model finds it itself."""
    if not arguments.explicit_mask:
        return torch.ones_like(source)
    inside = window.mask(source.device).to(source.dtype)
    return inside[None, :, None].expand_as(source)
