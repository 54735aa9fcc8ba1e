# SPDX-License-Identifier: Apache-2.0
"""One model's parts, as the device's thread uses them: weights shared with nobody's state.

diffusers' pipeline is kept for what it knows of ACE-Step (prompts, masks, source latents), and never called as a whole:
it would render one job at a time.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AceStepPipeline

from acestep_consumer.domain.job import LoadedModel
from acestep_consumer.engine.renderer.checkpoint import ModelHandle
from acestep_consumer.engine.renderer.offload import ModuleSwapper
from acestep_consumer.engine.renderer.packed_dit import PackedDit
from acestep_consumer.engine.renderer.rng import SongScheduler, SongVae
from acestep_consumer.engine.renderer.vae_decode import TileDecoder


class Components:
    """What a model consists of, and where each part is.

    Args:
        handle: the loaded model.
        device: where it computes.
        decoder: the VAE's decoder for tiles, of this model's VAE.
    """

    def __init__(self, handle: ModelHandle, device: torch.device, decoder: TileDecoder) -> None:
        parts = handle.pipeline.components
        self.model: LoadedModel = handle.model
        self.device = device
        self.vae = SongVae.view_of(parts["vae"])
        own = {"vae": self.vae, "tokenizer": copy.deepcopy(parts["tokenizer"])}
        self.pipeline = AceStepPipeline(**{**parts, **own})
        self.dit = PackedDit(parts["transformer"])
        self.decoder = decoder
        self.dtype: torch.dtype = parts["transformer"].dtype
        self.card: ModuleSwapper | None = None

    def offload(self, card: ModuleSwapper, *, keep_dit: bool) -> None:
        """Keep each part in RAM until it is used; the DiT stays on the device if asked."""
        modules = {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        if keep_dit:
            modules.pop("transformer").to(self.device)
        for module in (*modules.values(), self.decoder):
            card.adopt(module)
        self.card = card

    def use(self, part: Any) -> Any:
        """Return a part, on the device."""
        if self.card is not None:
            self.card.admit(part)
        return part

    def scheduler(self, generator: torch.Generator, given: Mapping[str, Any], *, stochastic: bool) -> SongScheduler:
        """Return a song's own scheduler, set to the steps that were asked for."""
        scheduler = SongScheduler.like(self.pipeline.scheduler, stochastic=stochastic)
        scheduler.generators = [generator]
        # On the CPU: what it is asked for are numbers, and each would make the CPU wait for the device.
        sigmas = self.pipeline._get_timestep_schedule(  # noqa: SLF001 - the pipeline's schedule, not a copy of it
            given["num_inference_steps"], given["shift"], "cpu", torch.float32, given["timesteps"]
        )
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device="cpu")
        scheduler.set_begin_index(0)
        return scheduler

    def codes_of(self, source: torch.Tensor, generators: Sequence[torch.Generator]) -> tuple[int, ...]:
        """Return the audio codes that a cover of ``source``, [channels, samples], would be made from."""
        pipeline = self.pipeline
        if pipeline.audio_tokenizer is None:
            raise ValueError("this checkpoint has no audio tokenizer, so it cannot read audio as codes")
        self.vae.generators = generators
        latents, _ = pipeline.prepare_src_latents(device=self.device, dtype=self.dtype, src_audio=source)
        silence = pipeline.condition_encoder.silence_latent.to(device=self.device, dtype=self.dtype)
        _, indices = self.use(pipeline.audio_tokenizer).tokenize(latents, silence)
        return tuple(indices.flatten().tolist())
