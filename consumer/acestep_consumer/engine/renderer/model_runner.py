# SPDX-License-Identifier: Apache-2.0
"""The forward passes of one model: text and audio encoders, DiT steps, VAE decode, audio tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acestep_consumer.domain.audio_codes import CODES_PER_SECOND
from acestep_consumer.engine.renderer.components import Components
from acestep_consumer.engine.renderer.conditioning import Conditioner
from acestep_consumer.engine.renderer.decoder.vae_decode import window_lengths
from acestep_consumer.engine.renderer.denoising.denoiser import Denoiser
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.denoising.rng import generators_for
from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.lora import AdaptedModelCache, Lora, Loras
from acestep_consumer.engine.renderer.lyrics.alignment_pass import alignment_matrices
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.output import gain_of, invalid_if_zero, limited, normalised
from acestep_consumer.engine.renderer.pipeline_arguments import PipelineArguments
from acestep_consumer.engine.renderer.prepare import PreparedRequest, RequestPreparer
from acestep_consumer.engine.renderer.quantization import weight_bytes
from acestep_consumer.engine.renderer.text_encoder import TextEncoder
from acestep_consumer.policy.memory_budget import TILE_RUNGS, StepGraphLimits
from acestep_schemas.request import INSTRUMENTAL, GenerationRequest


@dataclass(frozen=True, slots=True)
class Acceleration:
    """Optional speed-ups: ``compiled`` by ``torch.compile``; ``graphs``: replayed as CUDA graphs, within these limits.

    ``fused``: the VAE decoder runs the project's own kernels.
    """

    compiled: bool = False
    graphs: StepGraphLimits | None = None
    fused: bool = False


class ModelRunner:
    """Prepares, steps and decodes samples of one model. For the device's thread only, except ``preparer``.

    Args:
        parts: the model's components.
        acceleration: the speed-ups to use.
    """

    def __init__(self, parts: Components, acceleration: Acceleration = Acceleration()) -> None:
        self.parts = parts
        self.preparer = RequestPreparer(parts)
        self._acceleration = acceleration
        self._text_encoder = TextEncoder(parts, graphed=acceleration.graphs is not None)
        self._conditioner = Conditioner(parts, self.preparer, self._text_encoder)
        self._loras = AdaptedModelCache()
        self._denoisers: dict[Loras | None, Denoiser] = {None: self._denoiser(parts.dit)}

    @property
    def lora_bytes(self) -> int:
        """Device memory that the adapted DiT takes beside its base.

        That is the weights that its LoRAs changed, and what its CUDA graphs work on. Where the base is offloaded, the
        adapted one has all weights to itself: they stay on the device when the base's leave it.
        """
        adapted = [denoiser for lora, denoiser in self._denoisers.items() if lora is not None]
        if self.parts.swapper is not None and self.parts.dit.dit in self.parts.swapper:
            return sum(weight_bytes(denoiser.dit.dit) for denoiser in adapted)
        return self._loras.bytes + sum(denoiser.graph_bytes for denoiser in adapted)

    def samples(self, requests: Sequence[PreparedRequest], lora: Loras | None) -> list[tuple[Sample, ...] | Exception]:
        """Return each request's samples, or the error that it alone caused. All use the same LoRAs.

        Raises an out-of-memory error when the device has no room for them.
        """
        return self._conditioner.samples(requests, self.denoiser(lora).dit)

    def denoiser(self, lora: Loras | None) -> Denoiser:
        """Return the denoiser with these LoRAs, or with none. Raises ``Failed`` for one that does not fit."""
        if lora is not None and lora not in self._denoisers:
            self._denoisers = {None: self._denoisers[None]}  # its weights and graphs make room for the next one's
            adapted = PackedDit(self._loras.adapted(self.parts.use(self.parts.dit.dit), *lora))
            self._denoisers = {None: self._denoisers[None], lora: self._denoiser(adapted)}
        return self._denoisers[lora]

    def step(self, samples: Sequence[Sample], lora: Loras | None) -> list[Sequence[torch.Tensor]]:
        """Return the velocities of each sample's branches, [frames, channels] each."""
        denoiser = self.denoiser(lora)
        self.parts.use(denoiser.dit.dit)
        return denoiser.velocities(samples)

    def align(self, samples: Sequence[Sample], lora: Loras | None) -> list[torch.Tensor]:
        """Return the alignment of denoised samples with their lyrics, [2, tokens, frames] each, on the device."""
        dit = self.denoiser(lora).dit
        self.parts.use(dit.dit)
        asking = [(sample, sample.alignment) for sample in samples if sample.alignment is not None]
        return alignment_matrices(dit, asking, self.parts.alignment_heads)

    def decode(self, samples: Sequence[Sample], tiles_at_once: int) -> list[torch.Tensor]:
        """Decode finished samples: float32 audio, [channels, samples] each, as long and at the level that each says."""
        decoder = self.parts.use(self.parts.decoder)
        decoded = decoder.decode([invalid_if_zero(sample.latents) for sample in samples], tiles_at_once)
        heard = [
            audio if sample.heard_frames is None else audio[:, : sample.heard_frames * decoder.hop]
            for sample, audio in zip(samples, decoded, strict=True)
        ]
        heard = [
            audio if sample.level == 1 else audio * sample.level for sample, audio in zip(samples, heard, strict=True)
        ]
        for sample, audio in zip(samples, heard, strict=True):
            sample.gain = gain_of(audio, sample.peak)
        return [
            limited(audio) if sample.peak is None else normalised(audio, sample.peak)
            for sample, audio in zip(samples, heard, strict=True)
        ]

    def encode_audio(self, source: torch.Tensor, seed: int, *, tiled: bool) -> torch.Tensor:
        """Return latents of ``source``, [channels, samples], sampled with this seed: [frames, channels] in RAM."""
        parts = self.parts
        parts.vae.generators, parts.vae.use_tiling = generators_for((seed,)), tiled
        latents, _ = parts.pipeline.prepare_src_latents(device=parts.device, dtype=parts.dtype, src_audio=source)
        found: torch.Tensor = latents[0].cpu()
        return found

    def tokenize_audio(self, source: torch.Tensor, seed: int) -> tuple[int, ...]:
        """Return the audio codes of ``source``, [channels, samples], 5 a second."""
        return self.parts.codes_of(source, generators_for((seed,)))

    def warm_up(self) -> Iterator[str]:
        """Load and compile the encoders and the decoder; yields a line for the log before each."""
        yield "the condition encoders"
        self._conditioner.warm_up()
        yield "the VAE decoder"
        yield from self.parts.use(self.parts.decoder).warm_up()

    def render_warm_up(self) -> float:
        """Render a short song: kernels are loaded by their first use. Returns the peak of its audio."""
        codes = self.parts.pipeline.audio_tokenizer is not None
        (samples,) = self.samples([self.preparer.prepare(warm_up_arguments(codes=codes))], None)
        if isinstance(samples, Exception):
            raise samples
        while not samples[0].done:
            for sample, velocity in zip(samples, self.step(samples, None), strict=True):
                sample.advance(velocity)
        (audio,) = self.decode(samples, TILE_RUNGS[0])
        self.denoiser(None).forget_pack()
        return float(audio.abs().max())

    def decode_silence(self, tiles: int) -> None:
        """Decode so many tiles of silence at once, to measure the memory that they take."""
        decoder = self.parts.use(self.parts.decoder)
        channels = self.parts.vae.config.decoder_input_channels
        silence = torch.zeros(window_lengths(decoder.overlap)[0], channels, device=self.parts.device)
        decoder.decode([silence] * tiles, tiles)

    def offload(self, swapper: ModuleSwapper) -> None:
        """Keep every component in RAM between uses from now on, and use no CUDA graphs: they need fixed addresses."""
        self.free_caches()
        self.parts.offload(swapper, keep_dit=False)
        self._acceleration = Acceleration(compiled=self._acceleration.compiled)
        self._text_encoder.disable_graphs()
        self._denoisers = {None: self._denoiser(self.parts.dit)}

    def unload(self) -> None:
        """Move the offloaded component on the device, if any, back to RAM."""
        if self.parts.swapper is not None:
            self.parts.swapper.unload()

    def free_caches(self) -> None:
        """Free everything that can be made again: CUDA graphs, the last batch's layout, LoRA weights."""
        self._text_encoder.clear_graphs()
        self._denoisers = {None: self._denoisers[None]}
        self._denoisers[None].reset()
        self._loras.clear()

    def _denoiser(self, dit: PackedDit) -> Denoiser:
        if self._acceleration.compiled:
            dit.compile()
        return Denoiser(dit, self._acceleration.graphs)


def loras_of(request: GenerationRequest, paths: Sequence[Path]) -> Loras | None:
    """Return the request's LoRAs, whose files are at ``paths``; None where there is none."""
    named = zip(request.all_loras, paths, strict=True)
    return tuple(Lora.at(path, each.scale, each.alpha) for each, path in named) if paths else None


_SECONDS = 30


def warm_up_arguments(*, codes: bool) -> PipelineArguments:
    """Return the arguments of the warm-up song, from text or from audio codes as the planner writes them."""
    return PipelineArguments(
        prompt="silence",
        lyrics=INSTRUMENTAL,
        num_inference_steps=2,
        audio_duration=None if codes else float(_SECONDS),
        audio_codes=((0,) * CODES_PER_SECOND * _SECONDS,) if codes else (),
        seeds=(0,),
    )
