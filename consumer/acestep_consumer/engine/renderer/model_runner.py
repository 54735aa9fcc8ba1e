# SPDX-License-Identifier: Apache-2.0
"""One model at work on the device: prepares songs, steps them, makes sound of them, reads audio. One thread's alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.conditioning import Conditioner
from acestep_consumer.engine.renderer.denoiser import Denoiser
from acestep_consumer.engine.renderer.lora import AdaptedModelCache, Lora
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.packed_dit import PackedDit
from acestep_consumer.engine.renderer.pipeline_arguments import CODES_PER_SECOND, INSTRUMENTAL, PipelineArguments
from acestep_consumer.engine.renderer.prepare import PreparedRequest, RequestPreparer
from acestep_consumer.engine.renderer.rng import generators_for
from acestep_consumer.engine.renderer.sample import Sample
from acestep_consumer.engine.renderer.text_encoder import TextEncoder
from acestep_consumer.engine.renderer.vae_decode import lengths, normalised
from acestep_consumer.policy.memory_budget import TILE_RUNGS


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What makes the device faster and is not there everywhere: compiled blocks, recorded graphs."""

    compiled: bool = False
    graphed: bool = False


class ModelRunner:
    """One model.

    Args:
        parts: the model.
        speed: see there.
    """

    def __init__(self, parts: Components, speed: Acceleration = Acceleration()) -> None:
        self.parts = parts
        self.drafting = RequestPreparer(parts)
        self._speed = speed
        self._texts = TextEncoder(parts, graphed=speed.graphed)
        self._conditioner = Conditioner(parts, self.drafting, self._texts)
        self._loras = AdaptedModelCache()
        self._denoisers: dict[Lora | None, Denoiser] = {None: self._denoiser(parts.dit)}

    @property
    def lora_bytes(self) -> int:
        """Memory of the weights that a LoRA changed."""
        return self._loras.bytes

    def songs(self, drafts: Sequence[PreparedRequest], lora: Lora | None) -> list[tuple[Sample, ...] | Exception]:
        """Prepare the songs of drafts that use the same LoRA, or say why one has none. Raises out of memory."""
        return self._conditioner.songs(drafts, self.denoiser(lora).dit)

    def denoiser(self, lora: Lora | None) -> Denoiser:
        """Return what steps songs with this LoRA, or with none. Raises ``Failed`` for a LoRA that does not fit."""
        if lora not in self._denoisers:
            assert lora is not None  # noqa: S101 - the plain one is always there
            adapted = PackedDit(self._loras.adapted(self.parts.use(self.parts.dit.dit), lora))
            self._denoisers = {None: self._denoisers[None], lora: self._denoiser(adapted)}
        return self._denoisers[lora]

    def step(self, songs: Sequence[Sample], lora: Lora | None) -> list[Sequence[torch.Tensor]]:
        """Return the velocities of each song's voices."""
        denoiser = self.denoiser(lora)
        self.parts.use(denoiser.dit.dit)
        return denoiser.velocities(songs)

    def sound(self, songs: Sequence[Sample], tiles_at_once: int) -> list[torch.Tensor]:
        """Decode finished songs: float32 samples, [channels, samples] each, at -1 dBFS."""
        decoder = self.parts.use(self.parts.decoder)
        return [normalised(audio) for audio in decoder.decode([song.latents for song in songs], tiles_at_once)]

    def listen(self, source: torch.Tensor, seed: int) -> tuple[int, ...]:
        """Return the audio codes of ``source``, [channels, samples], 5 a second."""
        return self.parts.codes_of(source, generators_for((seed,)))

    def warm(self) -> Iterator[str]:
        """Load and compile what songs will need, a line for the log before each."""
        yield "the condition encoders"
        self._conditioner.warm()
        yield "the VAE's decoder"
        yield from self.parts.use(self.parts.decoder).warm()

    def rehearse(self) -> float:
        """Make a song and forget it: kernels are loaded by their first use. Returns the peak of its sound."""
        codes = self.parts.pipeline.audio_tokenizer is not None
        (songs,) = self.songs([self.drafting.draft(rehearsal(codes=codes))], None)
        if isinstance(songs, Exception):
            raise songs
        while not songs[0].done:
            for song, flow in zip(songs, self.step(songs, None), strict=True):
                song.advance(flow)
        (sound,) = self.sound(songs, TILE_RUNGS[0])
        self.denoiser(None).forget()
        return float(sound.abs().max())

    def decode_tiles(self, tiles: int) -> None:
        """Decode so many tiles of silence at once, to see what that takes."""
        decoder = self.parts.use(self.parts.decoder)
        channels = self.parts.vae.config.decoder_input_channels
        silence = torch.zeros(lengths(decoder.overlap)[0], channels, device=self.parts.device)
        decoder.decode([silence] * tiles, tiles)

    def offload(self, card: ModuleSwapper) -> None:
        """Keep every part in RAM until it is used, from now on. What is at a fixed place in memory is given up."""
        self.forget()
        self.parts.offload(card, keep_dit=False)
        self._speed = Acceleration(compiled=self._speed.compiled)
        self._texts.give_up_graphs()
        self._denoisers = {None: self._denoiser(self.parts.dit)}

    def rest(self) -> None:
        """Nothing is to be done for now: an offloaded part on the card goes back to RAM."""
        if self.parts.card is not None:
            self.parts.card.clear()

    def forget(self) -> None:
        """Drop everything that can be made again, to free memory. LoRAs are among it."""
        self._texts.forget()
        self._denoisers = {None: self._denoisers[None]}
        self._denoisers[None].forget()
        self._loras.clear()

    def _denoiser(self, dit: PackedDit) -> Denoiser:
        if self._speed.compiled:
            dit.compile()
        return Denoiser(dit, graphed=self._speed.graphed)


def lora_of(path: Path | None, scale: float) -> Lora | None:
    """Return the LoRA that a job asks for, if it does."""
    return None if path is None else Lora.at(path, scale)


_SECONDS = 30
_STEPS = 2


def rehearsal(*, codes: bool) -> PipelineArguments:
    """Return the arguments of a song from text, or from audio codes as the language model writes them."""
    made_from = {"audio_codes": ["<|audio_code_0|>" * CODES_PER_SECOND * _SECONDS]} if codes else {}
    given = {
        "prompt": ["silence"],
        "lyrics": [INSTRUMENTAL],
        "vocal_language": "en",
        "instruction": None,
        "bpm": None,
        "keyscale": None,
        "timesignature": None,
        "task_type": "text2music",
        "track_name": None,
        "complete_track_classes": None,
        "num_inference_steps": _STEPS,
        "shift": 3.0,
        "timesteps": None,
        "guidance_scale": 1.0,
        "cfg_interval_start": 0.0,
        "cfg_interval_end": 1.0,
        "audio_cover_strength": 1.0,
        "reference_audio": None,
        "audio_duration": None if codes else float(_SECONDS),
        **made_from,
    }
    return PipelineArguments(pipeline=given, seeds=(0,), steps=_STEPS, method="ode", tiled=True)
