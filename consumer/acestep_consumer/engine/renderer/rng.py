# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a song: drawn from its own seed, whatever else is being rendered.

Three things are drawn: the initial noise, the noise that the SDE sampler adds at each step, and the sample of the VAE's
posterior when it encodes source and reference audio. diffusers draws the first from the generators that
it is given and the other two from torch's global generator, which concurrent songs would share. Here each song has two
generators of its own, both started from its seed: one for noise (initial noise, then SDE steps), one for the posterior
(source, then reference).

It follows, for one song and seed ``s``, with ``G = torch.Generator().manual_seed(s)``:

* ODE: equal to the plain pipeline called with ``generator=G`` after ``torch.manual_seed(s)``.
* SDE: equal to the plain pipeline with ``generator=G`` and a stochastic scheduler whose ``step`` is given the same
  ``G``. Without source and reference audio that is the plain pipeline with no generator after ``torch.manual_seed(s)``.
* In a batch, each song equals the same song alone, up to rounding. (The plain pipeline draws one posterior for a whole
  batch.)

The generators are on the CPU, so that a seed gives the same noise on every device. On a GPU the plain pipeline would
draw its posterior there; its other numbers are the same.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleckOutput


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a fresh generator per seed, on the CPU."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class SeededScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """ACE-Step's Euler scheduler, with SDE noise from the songs' own generators."""

    generators: list[torch.Generator] | None = None

    @classmethod
    def like(cls, scheduler: Any, *, stochastic: bool) -> "SeededScheduler":
        """Return a scheduler with the checkpoint's config and no state yet."""
        made: SeededScheduler = cls.from_config(scheduler.config, stochastic_sampling=stochastic)
        return made

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step; see the base class."""
        return super().step(*args, **{**kwargs, "generator": self.generators})


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
        return self._mean + self._std * noise.to(self._mean.device)
