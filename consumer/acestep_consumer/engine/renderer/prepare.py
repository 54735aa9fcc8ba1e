# SPDX-License-Identifier: Apache-2.0
"""Preparation of a job on the CPU: texts as tokens, the initial noise, the number of latent frames.

It runs in the job's own thread, so that the device's thread does not have to wait for it.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.denoising.rng import generators_for
from acestep_consumer.engine.renderer.denoising.sample import mixed_noise
from acestep_consumer.engine.renderer.lyrics.alignment_pass import alignment_noise
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import AlignmentRequest, LyricTokens, pieces_of
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.source import LEAST_FRAMES
from acestep_consumer.policy.tiers import DEFAULT_DURATION_S
from acestep_schemas.request import TaskType

_TEXT, _LYRICS = 256, 2048  # tokens that the model reads of each
_LYRIC_HEADER, _END = "\n# Lyric\n", "<|endoftext|>"


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """One text condition as token ids: the prompt with its metadata, and the lyrics."""

    text: list[int]
    lyrics: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRequest:
    """A job that is prepared as far as the CPU can.

    ``texts``: the task's texts; where the text alone takes over, its texts; of a flow edit, those of its source.
    ``codes``: each song's audio codes, or none. ``frames``: latent frames, None when the source audio decides.
    ``noise``: [songs, frames, channels] with at least ``LEAST_FRAMES``, None likewise. ``length``: latent frames that
    are denoised, estimated where ``frames`` is None. ``lyrics``: what the songs are aligned with; None: they are not.
    """

    arguments: PipelineArguments
    texts: tuple[TokenizedText, ...]
    codes: tuple[list[int], ...]
    frames: int | None
    length: int
    noise: torch.Tensor | None
    generators: tuple[torch.Generator, ...]
    warnings: tuple[str, ...] = ()
    lyrics: LyricTokens | None = None

    @property
    def alignment(self) -> AlignmentRequest | None:
        """Lyrics that each song is aligned with, and the flow time; None: none."""
        if self.lyrics is None:
            return None
        return AlignmentRequest(self.lyrics, 1.0 / self.arguments.num_inference_steps)

    @property
    def condition_tokens(self) -> int:
        """Tokens of all conditions of one song; the empty condition of guidance has one."""
        return sum(len(each.text) + len(each.lyrics) + 1 for each in self.texts) + 1


class RequestPreparer:
    """Prepares requests for one model. Safe to use from many threads."""

    def __init__(self, parts: Components) -> None:
        self._parts = parts
        self._pipeline = parts.pipeline
        self._dtype = parts.dtype
        self._channels: int = parts.dit.dit.config.audio_acoustic_hidden_dim
        # The tokenizer keeps the truncation of the call as its own state.
        self._tokenizing = threading.Lock()

    def prepare(self, arguments: PipelineArguments) -> PreparedRequest:
        """Prepare one job. Raises ``ValueError`` and ``TypeError`` for arguments that the pipeline refuses."""
        self._check(arguments)
        texts, warnings = zip(*(self._tokenized(*text) for text in self._texts(arguments)), strict=True)
        if arguments.switches:
            texts = (texts[0], self._as_long(texts[1], texts[0]), *texts[2:])
        codes = tuple(map(self._within_codebook, arguments.audio_codes))
        frames = self._frames(arguments)
        length = max(self._source_frames(arguments) if frames is None else frames, LEAST_FRAMES)
        lyrics = self._lyrics(arguments, texts[0].lyrics) if arguments.align and self._parts.alignment_heads else None
        if lyrics is not None:
            alignment_noise(length, self._channels)  # kept; drawing it takes as long as three layers of the DiT
        generators = generators_for(arguments.seeds)
        return PreparedRequest(
            arguments=arguments,
            texts=texts,
            codes=codes,
            frames=frames,
            length=length,
            noise=None if frames is None or arguments.device_noise else self.noise(arguments, generators, frames),
            generators=tuple(generators),
            warnings=(*warnings[0], *(self._alignment_warnings() if arguments.align else ())),
            lyrics=lyrics,
        )

    def _alignment_warnings(self) -> Iterator[str]:
        name = self._parts.model.name
        if not self._parts.alignment_heads:
            yield f"the lyrics have no times and no score: {name} has none of the heads that follow the singing"
        elif self._parts.model.wide and not self._parts.alignment_heads_named:
            yield f"times and score of the lyrics may be wrong: the config of {name} does not name its alignment heads"

    def _lyrics(self, arguments: PipelineArguments, ids: list[int]) -> LyricTokens | None:
        """Return the tokens of the lyrics alone: those after the header, up to the token that ends them."""
        _, formatted = self._formatted(arguments, "")
        header = formatted[: formatted.index(_LYRIC_HEADER) + len(_LYRIC_HEADER)]
        tokenizer = self._pipeline.tokenizer
        with self._tokenizing:
            start = len(tokenizer(header, add_special_tokens=False).input_ids)
        end_id = tokenizer.convert_tokens_to_ids(_END)
        own = ids[start:]
        own = own[: own.index(end_id)] if end_id in own else own
        pieces = pieces_of(
            tokenizer.batch_decode([[each] for each in own]), lambda *some: tokenizer.decode(own[slice(*some)])
        )
        return LyricTokens(start, len(own), tuple(pieces)) if own else None

    def noise(self, arguments: PipelineArguments, generators: Sequence[torch.Generator], frames: int) -> torch.Tensor:
        """Draw the initial noise of songs, [songs, frames, channels], on the device of the generators.

        There are never fewer than ``LEAST_FRAMES``.
        """
        shape = (1, max(frames, LEAST_FRAMES), self._channels)
        noise = torch.cat([self._drawn(shape, generator) for generator in generators])
        if not arguments.retake_variance:
            return noise
        retakes = generators_for(arguments.retake_seeds, generators[0].device)
        others = torch.cat([self._drawn(shape, generator) for generator in retakes])
        return mixed_noise(noise, others, arguments.retake_variance)

    def _drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=self._dtype)

    def _check(self, arguments: PipelineArguments) -> None:
        self._pipeline.check_inputs(
            prompt=arguments.prompt,
            lyrics=arguments.lyrics,
            task_type=arguments.model_task,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            shift=arguments.shift,
            audio_cover_strength=arguments.audio_cover_strength,
            cfg_interval_start=arguments.cfg_interval_start,
            # The pipeline refuses an empty interval; here it means that no step is guided, as in ACE-Step.
            cfg_interval_end=max(arguments.cfg_interval_start, arguments.cfg_interval_end),
            repainting_start=arguments.repainting_start,
            repainting_end=arguments.repainting_end,
        )

    def _texts(self, arguments: PipelineArguments) -> Iterator[tuple[str, str]]:
        """Yield the texts of each condition: the task's, those of the text alone, those of a flow edit's source."""
        instruction = arguments.instruction or self._instruction(arguments.model_task, arguments)
        yield self._formatted(arguments, instruction)
        if arguments.switches:
            yield self._formatted(arguments, self._instruction("text2music", arguments))
        if (edit := arguments.flow_edit) is not None:
            yield self._formatted(replace(arguments, prompt=edit.caption, lyrics=edit.lyrics), instruction)

    def _instruction(self, task: TaskType, arguments: PipelineArguments) -> str:
        instruction: str = self._pipeline._get_task_instruction(  # noqa: SLF001 - the pipeline's words, not a copy of them
            task, arguments.track_name, list(arguments.track_classes) or None
        )
        return instruction

    def _formatted(self, arguments: PipelineArguments, instruction: str) -> tuple[str, str]:
        text, lyrics = self._pipeline._format_prompt(  # noqa: SLF001 - as above
            prompt=arguments.prompt,
            lyrics=arguments.lyrics,
            vocal_language=arguments.vocal_language,
            audio_duration=self._seconds(arguments),
            instruction=instruction,
            bpm=arguments.bpm,
            keyscale=arguments.keyscale,
            timesignature=arguments.timesignature,
        )
        return text, lyrics

    def _tokenized(self, text: str, lyrics: str) -> tuple[TokenizedText, tuple[str, ...]]:
        """Return the tokens that the model reads, and a warning for each text that is truncated."""
        (text_ids, text_count), (lyric_ids, lyric_count) = self._tokens(text, _TEXT), self._tokens(lyrics, _LYRICS)
        counts = (("prompt", text_count, _TEXT), ("lyrics", lyric_count, _LYRICS))
        warnings = tuple(
            f"{name} was truncated: it has {count} tokens, and the model reads {limit}"
            for name, count, limit in counts
            if count > limit
        )
        return TokenizedText(text_ids, lyric_ids), warnings

    def _as_long(self, later: TokenizedText, first: TokenizedText) -> TokenizedText:
        """Return a text with as many tokens as the first one, as ACE-Step does: padded, or cut.

        The DiT attends to the padding too.
        """
        count = len(first.text)
        padded = later.text + [self._pipeline.tokenizer.pad_token_id] * (count - len(later.text))
        return replace(later, text=padded[:count])

    def _tokens(self, text: str, limit: int) -> tuple[list[int], int]:
        with self._tokenizing:
            whole = len(self._pipeline.tokenizer(text, verbose=False).input_ids)
            return self._pipeline.tokenizer(text, truncation=True, max_length=limit).input_ids, whole

    def _seconds(self, arguments: PipelineArguments) -> float:
        """Return the duration that the text condition names."""
        if arguments.audio_duration is not None:
            return arguments.audio_duration
        if arguments.audio_codes:
            return len(arguments.audio_codes[0]) / CODES_PER_SECOND
        if arguments.src_audio is not None:
            return float(arguments.src_audio.shape[-1] / self._pipeline.sample_rate)
        return DEFAULT_DURATION_S

    def _within_codebook(self, codes: tuple[int, ...]) -> list[int]:
        """Return codes that the model has. A number beyond the codebook stands for its last code, as in diffusers."""
        tokenizer = self._pipeline.audio_tokenizer
        if tokenizer is None:
            raise ValueError("this checkpoint has no audio tokenizer, so it cannot read audio codes")
        last = math.prod(tokenizer.quantizer.levels) - 1
        return [min(code, last) for code in codes]

    def _frames(self, arguments: PipelineArguments) -> int | None:
        """Return the latent frames; None when the source audio decides."""
        rate: float = self._pipeline.latents_per_second
        if arguments.audio_codes:
            return round(len(arguments.audio_codes[0]) * rate / CODES_PER_SECOND)
        if arguments.src_audio is not None:
            return None
        # As ACE-Step counts: tenths of a second, then whole samples, then whole frames, each time cut.
        samples = int(round(self._seconds(arguments), 1) * self._pipeline.sample_rate)
        return max(int(samples * rate / self._pipeline.sample_rate), 1)

    def _source_frames(self, arguments: PipelineArguments) -> int:
        """Return the latent frames of the source audio, or one more."""
        samples = 0 if arguments.src_audio is None else arguments.src_audio.shape[-1]
        rate: float = self._pipeline.latents_per_second / self._pipeline.sample_rate
        return math.ceil(samples * rate)
