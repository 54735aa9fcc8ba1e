# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a song: drawn from its own seed, whatever else is being rendered.

Three things are drawn: the initial noise, the noise that the SDE sampler adds at each step, and the sample of the VAE's
posterior when it encodes source and reference audio. Each song has two generators of its own, both started from its
seed: one for noise (initial noise, then SDE steps), one for the posterior (source, then reference). A song in a batch
therefore equals the same song alone, up to rounding.

The generators are on the CPU, so that a seed gives the same noise on every device. Where a request asks for the
device's own noise, the first one is a generator of the device, as in ACE-Step's server.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderOobleck
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleckOutput

from acestep_consumer.engine.renderer.denoising.pack import on_device


def generators_for(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Return a fresh generator per seed, on the CPU unless another device is named."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


class SeededVae(AutoencoderOobleck):  # type: ignore[misc]  # diffusers has no types
    """A view of a loaded VAE: the same weights, but tiling flags and generators of its own."""

    generators: Sequence[torch.Generator] = ()

    @classmethod
    def view_of(cls, vae: Any) -> "SeededVae":
        """Return a view. A shallow copy of a module shares its parameters and submodules, and no plain attribute."""
        view: SeededVae = copy.copy(vae)
        view.__class__ = cls
        # One song is decoded at a time: the same result, and the memory of one.
        view.use_slicing = True
        return view

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:  # noqa: FBT001, FBT002 - as in the base class
        """Encode audio of shape [1, channels, samples]; the posterior is sampled once per song."""
        posterior = SeededPosterior(super().encode(x).latent_dist, self.generators)
        return AutoencoderOobleckOutput(latent_dist=posterior) if return_dict else (posterior,)


class SeededPosterior:
    """The VAE's posterior of one piece of audio, for several songs."""

    def __init__(self, posterior: Any, generators: Sequence[torch.Generator]) -> None:
        self._mean: torch.Tensor = posterior.mean
        self._std: torch.Tensor = posterior.std
        self._generators = generators

    def sample(self) -> torch.Tensor:
        """Return latents of shape [songs, channels, frames], each song's drawn from its own generator."""
        shape, dtype = self._mean.shape, self._mean.dtype
        noise = torch.cat([torch.randn(shape, generator=each, dtype=dtype) for each in self._generators])
        return self._mean + self._std * on_device(noise, self._mean.device)
