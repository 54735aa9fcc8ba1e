# SPDX-License-Identifier: Apache-2.0
"""A lane renders one job at a time. Lanes share weights and nothing else, so that they can run side by side.

What must not be shared: the pipeline (it keeps the state of a call on itself), the scheduler (its step counter), the
tokenizer (its truncation is set anew for each text), and the VAE's flags and randomness.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AceStepPipeline

from consumer.engine.renderer.arguments import Arguments
from consumer.engine.renderer.checkpoint import ModelHandle
from consumer.engine.renderer.device import DeviceReport, Offload
from consumer.engine.renderer.offload import OneAtATime
from consumer.engine.renderer.randomness import SongScheduler, SongVae, generators_for
from consumer.job import LoadedModel

OnStep = Callable[[int], None]
"""Called after each denoising step with the number of steps done. May raise to stop the song."""


class Lane:
    """A pipeline per model, for one thread. ``models`` are the handles' facts by name."""

    def __init__(self, handles: Sequence[ModelHandle], device: DeviceReport, offload: Offload = Offload()) -> None:  # noqa: B008 - frozen
        self._device = torch.device(device.device)
        self._booths = {handle.model.name: _Booth(handle, self._device, offload) for handle in handles}
        self._busy = threading.Lock()
        self.models: Mapping[str, LoadedModel] = {handle.model.name: handle.model for handle in handles}

    def sing(self, model: str, arguments: Arguments, on_step: OnStep) -> torch.Tensor:
        """Render the songs of one job. Returns float32 samples of shape [songs, channels, n] in RAM.

        Raises what torch and diffusers raise, and what ``on_step`` raises.
        """
        with self._alone(), self._on_device():
            return self._booths[model].sing(arguments, on_step)

    def listen(self, model: str, source: torch.Tensor, seed: int) -> tuple[int, ...]:
        """Return the audio codes of ``source``, [channels, samples] at the model's rate: 5 a second.

        ``seed`` is that of the point that the VAE takes from its posterior.
        """
        with self._alone(), self._on_device():
            return self._booths[model].listen(source, seed)

    def cut_texts(self, model: str, arguments: Arguments) -> tuple[str, ...]:
        """Return a warning for each text that is longer than the model reads."""
        return self._booths[model].cut_texts(arguments)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("a lane renders one job at a time")
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Kernels are launched on the thread's current card, which is card 0 until told otherwise."""
        if self._device.type in ("cpu", "mps"):
            yield
        else:
            with torch.get_device_module(self._device).device(self._device.index):
                yield


class _Booth:
    """One model's pipeline in one lane."""

    def __init__(self, handle: ModelHandle, device: torch.device, offload: Offload) -> None:
        parts = handle.pipeline.components
        self._vae = SongVae.view_of(parts["vae"])
        self._schedulers = {
            method: SongScheduler.like(parts["scheduler"], stochastic=method == "sde") for method in ("ode", "sde")
        }
        own = {
            "vae": self._vae,
            "tokenizer": copy.deepcopy(parts["tokenizer"]),
            "scheduler": self._schedulers["ode"],
        }
        self._pipeline = _LanePipeline(**{**parts, **own})
        self._pipeline.set_progress_bar_config(disable=True)
        if offload.models:
            self._pipeline.offload(device, keep_dit=not offload.dit)

    def sing(self, arguments: Arguments, on_step: OnStep) -> torch.Tensor:
        noise = generators_for(arguments.seeds)
        scheduler = self._schedulers[arguments.method]
        scheduler.generators, self._vae.generators = noise, generators_for(arguments.seeds)
        self._vae.use_tiling = arguments.tiled
        self._pipeline.scheduler = scheduler

        def step_ended(_pipeline: Any, step: int, _time: float, _tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1)
            return {}

        try:
            result = self._pipeline(**arguments.pipeline, generator=noise, callback_on_step_end=step_ended)
            audios: torch.Tensor = result.audios
            return audios.float().cpu()
        finally:
            self._pipeline.maybe_free_model_hooks()  # a call that was stopped has not come to that

    @torch.no_grad()
    def listen(self, source: torch.Tensor, seed: int) -> tuple[int, ...]:
        self._vae.generators = generators_for((seed,))
        try:
            return self._pipeline.codes_of(source)
        finally:
            self._pipeline.maybe_free_model_hooks()

    def cut_texts(self, arguments: Arguments) -> tuple[str, ...]:
        given = arguments.pipeline
        text, lyrics = self._pipeline.texts(given)
        lengths = (("prompt", text, 256), ("lyrics", lyrics, 2048))
        counted = (
            (name, len(self._pipeline.tokenizer(each, verbose=False).input_ids), most) for name, each, most in lengths
        )
        return tuple(
            f"{name} was cut: it makes {count} tokens, and the model reads {most}"
            for name, count, most in counted
            if count > most
        )


class _LanePipeline(AceStepPipeline):  # type: ignore[misc]  # diffusers has no types
    """The pipeline as it is, less two faults, and with offloading of our own."""

    card: OneAtATime | None = None

    def offload(self, device: torch.device, *, keep_dit: bool) -> None:
        """Keep each model in RAM until it is called; the DiT stays on the card if asked."""
        modules = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
        if keep_dit:
            self._exclude_from_cpu_offload = ["transformer"]
            modules.pop("transformer").to(device)
        self.card = OneAtATime(modules.values(), device)

    def maybe_free_model_hooks(self) -> None:
        """Empty the card. The base class calls this when a song is done."""
        if self.card is not None:
            self.card.clear()

    def codes_of(self, source: torch.Tensor) -> tuple[int, ...]:
        """Return the codes that a cover of ``source`` would be made from."""
        if self.audio_tokenizer is None:
            raise ValueError("this checkpoint has no audio tokenizer, so it cannot read audio as codes")
        device, dtype = self._execution_device, self.transformer.dtype
        latents, _ = self.prepare_src_latents(device=device, dtype=dtype, src_audio=source)
        silence = self.condition_encoder.silence_latent.to(device=device, dtype=dtype)
        _, indices = self.audio_tokenizer.tokenize(latents, silence)
        return tuple(indices.flatten().tolist())

    def texts(self, given: Mapping[str, Any]) -> tuple[str, str]:
        """Return the two texts that the first song's prompt and lyrics become, the longest part of each as given."""
        text, lyrics = self._format_prompt(
            prompt=given["prompt"][0],
            lyrics=given["lyrics"][0],
            vocal_language=given["vocal_language"],
            instruction=given["instruction"],
            bpm=given["bpm"],
            keyscale=given["keyscale"],
            timesignature=given["timesignature"],
        )
        return str(text), str(lyrics)

    def prepare_latents(self, *, audio_duration: float, **kwargs: Any) -> torch.Tensor:
        """Draw the first noise, of as many frames as everything else in this call has.

        The base class gets the frame count back as ``ceil(frames / 25.0 * 25.0)``, which is one too many for some
        counts, 411 among them: songs of such a length would fail.
        """
        frames = round(audio_duration * self.latents_per_second)
        latents: torch.Tensor = super().prepare_latents(
            audio_duration=(frames - 0.5) / self.latents_per_second, **kwargs
        )
        return latents

    def prepare_src_latents(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the source; the base class reads the tokenizer's codebook without calling the tokenizer.

        An offloaded tokenizer would still be in RAM then.
        """
        if self.card is not None and kwargs.get("audio_codes") is not None:
            self.card.admit(self.audio_tokenizer)
        return super().prepare_src_latents(*args, **kwargs)
