# SPDX-License-Identifier: Apache-2.0
"""Components of one model, with state of its own where models share weights.

diffusers' pipeline is kept for its knowledge of ACE-Step (prompts, masks, source latents), and never called as a
whole: it would render one job at a time.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AceStepPipeline

from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.engine.renderer.checkpoints.checkpoint import ModelHandle
from acestep_consumer.engine.renderer.decoder.vae_decode import TileDecoder
from acestep_consumer.engine.renderer.denoising.packed_dit import PackedDit
from acestep_consumer.engine.renderer.denoising.rng import SeededVae
from acestep_consumer.engine.renderer.latents import LatentSpace
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import existing_heads
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.quantization import move


class Components:
    """The components of one model, on the device or offloaded.

    Args:
        handle: the loaded model.
        device: where it computes.
        decoder: the tile decoder of this model's VAE.
    """

    def __init__(self, handle: ModelHandle, device: torch.device, decoder: TileDecoder) -> None:
        components = handle.pipeline.components
        self.model: LoadedModel = handle.model
        self.device = device
        self.vae = SeededVae.view_of(components["vae"])
        own = {"vae": self.vae, "tokenizer": copy.deepcopy(components["tokenizer"])}
        self.pipeline = AceStepPipeline(**{**components, **own})
        self.dit = PackedDit(components["transformer"])
        self.dit.join_cross_weights()
        self.alignment_heads_named = handle.alignment_heads is not None
        self.alignment_heads = existing_heads(handle.alignment_heads, components["transformer"].config)
        self.decoder = decoder
        self.latent_space = LatentSpace.of(components["vae"], handle.model.latent_rate)
        self.dtype: torch.dtype = components["transformer"].dtype
        self.swapper: ModuleSwapper | None = None

    def offload(self, swapper: ModuleSwapper, *, keep_dit: bool) -> None:
        """Keep each component in RAM until it is used; with ``keep_dit`` the DiT stays on the device."""
        modules = {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        if keep_dit:
            move(modules.pop("transformer"), self.device)
        for module in (*modules.values(), self.decoder):
            swapper.register(module)
        self.swapper = swapper

    def use(self, part: Any) -> Any:
        """Return a component, loaded on the device."""
        if self.swapper is not None:
            self.swapper.load(part)
        return part

    def codes_of(self, source: torch.Tensor, generators: Sequence[torch.Generator]) -> tuple[int, ...]:
        """Return the audio codes of ``source``, [channels, samples], as a cover of it would use them."""
        pipeline = self.pipeline
        if pipeline.audio_tokenizer is None:
            raise ValueError("this checkpoint has no audio tokenizer, so it cannot read audio as codes")
        self.vae.generators = generators
        latents, _ = pipeline.prepare_src_latents(device=self.device, dtype=self.dtype, src_audio=source)
        silence = pipeline.condition_encoder.silence_latent.to(device=self.device, dtype=self.dtype)
        _, indices = self.use(pipeline.audio_tokenizer).tokenize(latents, silence)
        return tuple(indices.flatten().tolist())
