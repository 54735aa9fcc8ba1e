# SPDX-License-Identifier: Apache-2.0
"""Preparation of a job on the CPU: texts as tokens, the initial noise, the number of latent frames.

It runs in the job's own thread, so that the device's thread does not have to wait for it.
"""

import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.pipeline_arguments import CODES_PER_SECOND, PipelineArguments
from acestep_consumer.engine.renderer.rng import generators_for

_TEXT, _LYRICS = 256, 2048  # tokens that the model reads of each
_DEFAULT_S = 60.0
_CODE = re.compile(r"<\|audio_code_(\d+)\|>")


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """One text condition as token ids: the prompt with its metadata, and the lyrics."""

    text: list[int]
    lyrics: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRequest:
    """A job that is prepared as far as the CPU can.

    ``texts``: the task's texts and, for a cover that is blended with its text, those of the text alone.
    ``codes``: each song's audio codes, or none. ``frames``: latent frames, None when the source audio decides.
    ``noise``: [songs, frames, channels], None likewise. ``length``: latent frames, estimated where ``frames`` is None.
    """

    arguments: PipelineArguments
    task: str
    texts: tuple[TokenizedText, ...]
    codes: tuple[list[int], ...]
    frames: int | None
    length: int
    noise: torch.Tensor | None
    generators: tuple[torch.Generator, ...]
    warnings: tuple[str, ...] = ()

    @property
    def given(self) -> Any:
        """The pipeline's arguments."""
        return self.arguments.pipeline

    @property
    def condition_tokens(self) -> int:
        """Tokens of all conditions of one song; the empty condition of guidance has one."""
        return sum(len(each.text) + len(each.lyrics) + 1 for each in self.texts) + 1


class RequestPreparer:
    """Prepares requests for one model. Safe to use from many threads."""

    def __init__(self, parts: Components) -> None:
        self._pipeline = parts.pipeline
        self._dtype = parts.dtype
        self._channels: int = parts.dit.dit.config.audio_acoustic_hidden_dim
        # The tokenizer keeps the truncation of the call as its own state.
        self._tokenizing = threading.Lock()

    def prepare(self, arguments: PipelineArguments) -> PreparedRequest:
        """Prepare one job. Raises ``ValueError`` and ``TypeError`` for arguments that the pipeline refuses."""
        given = arguments.pipeline
        task = _task_of(given)
        self._check(given, task)
        texts, warnings = zip(*(self._tokenized(*text) for text in self._texts(given, task)), strict=True)
        codes = tuple(self._parsed(text) for text in given.get("audio_codes") or ())
        frames = self._frames(given, codes)
        generators = generators_for(arguments.seeds)
        return PreparedRequest(
            arguments=arguments,
            task=task,
            texts=texts,
            codes=codes,
            frames=frames,
            length=frames or math.ceil(self._seconds(given) * self._pipeline.latents_per_second),
            noise=None if frames is None else self.noise(generators, frames),
            generators=tuple(generators),
            warnings=warnings[0],
        )

    def noise(self, generators: list[torch.Generator], frames: int) -> torch.Tensor:
        """Draw the initial noise of songs, [songs, frames, channels], on the CPU."""
        shape = (len(generators), frames, self._channels)
        noise: torch.Tensor = randn_tensor(shape, generator=generators, device=torch.device("cpu"), dtype=self._dtype)
        return noise

    def _check(self, given: Any, task: str) -> None:
        names = (
            "prompt",
            "lyrics",
            "num_inference_steps",
            "guidance_scale",
            "shift",
            "audio_cover_strength",
            "cfg_interval_start",
            "cfg_interval_end",
        )
        window = {name: given.get(name) for name in ("repainting_start", "repainting_end")}
        self._pipeline.check_inputs(**{name: given[name] for name in names}, **window, task_type=task)

    def _texts(self, given: Any, task: str) -> Iterator[tuple[str, str]]:
        instruction = given["instruction"] or self._instruction(given["task_type"] if task != "cover" else task, given)
        yield self._formatted(given, instruction)
        if task == "cover" and given["audio_cover_strength"] < 1.0:
            yield self._formatted(given, self._instruction("text2music", given))

    def _instruction(self, task: str, given: Any) -> str:
        instruction: str = self._pipeline._get_task_instruction(  # noqa: SLF001 - the pipeline's words, not a copy of them
            task, given["track_name"], given["complete_track_classes"]
        )
        return instruction

    def _formatted(self, given: Any, instruction: str) -> tuple[str, str]:
        text, lyrics = self._pipeline._format_prompt(  # noqa: SLF001 - as above
            prompt=given["prompt"][0],
            lyrics=given["lyrics"][0],
            vocal_language=given["vocal_language"],
            audio_duration=self._seconds(given),
            instruction=instruction,
            bpm=given["bpm"],
            keyscale=given["keyscale"],
            timesignature=given["timesignature"],
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

    def _tokens(self, text: str, limit: int) -> tuple[list[int], int]:
        with self._tokenizing:
            whole = len(self._pipeline.tokenizer(text, verbose=False).input_ids)
            return self._pipeline.tokenizer(text, truncation=True, max_length=limit).input_ids, whole

    def _seconds(self, given: Any) -> float:
        """Return the duration that the text condition names."""
        if given.get("audio_codes"):
            return len(_CODE.findall(given["audio_codes"][0])) / CODES_PER_SECOND
        if given["audio_duration"] is None and given.get("src_audio") is not None:
            return float(given["src_audio"].shape[-1] / self._pipeline.sample_rate)
        return float(given["audio_duration"] or _DEFAULT_S)

    def _parsed(self, text: str) -> list[int]:
        """Return the codes of a text. A number beyond the codebook stands for its last code, as in diffusers."""
        tokenizer = self._pipeline.audio_tokenizer
        if tokenizer is None:
            raise ValueError("this checkpoint has no audio tokenizer, so it cannot read audio codes")
        most = math.prod(tokenizer.quantizer.levels) - 1
        return [min(int(number), most) for number in _CODE.findall(text)]

    def _frames(self, given: Any, codes: tuple[list[int], ...]) -> int | None:
        rate: float = self._pipeline.latents_per_second
        if codes:
            return round(len(codes[0]) * rate / CODES_PER_SECOND)
        return None if given.get("src_audio") is not None else math.ceil(self._seconds(given) * rate)


def _task_of(given: Any) -> str:
    """Return the task as the model knows it: a song from audio codes is a cover."""
    task: str = given["task_type"]
    return "cover" if given.get("audio_codes") and task == "text2music" else task
