# SPDX-License-Identifier: Apache-2.0
"""A song's final latents in a file: those that the VAE decoded, after ``latent_rescale`` and ``latent_shift``.

A song that is made from this one starts from them, without the round trip of decoding, encoding into a file and
encoding again. The file is a safetensors file with one tensor, ``latents``: float16, [frames, channels]. Its metadata
say what they belong to:

- ``format``: ``acestep-latents-1``
- ``model``: the DiT that made them
- ``vae``: fingerprint of the VAE that they are for
- ``latent_rate``: frames a second
- ``gain``: what the decoded samples were multiplied by, so that latents and file have one level
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from acestep_consumer.domain.job import SideFile

FORMAT: Final = "acestep-latents-1"
CONTENT_TYPE: Final = "application/octet-stream"
_NAME: Final = "latents"
_SIGNS: Final = 512
_FRAMES_OFF: Final = 3
"""Frames by which a song's file may differ from its latents: encoders of lossy formats pad the ends."""


class LatentsUnusable(Exception):
    """The latents do not belong to this song or to this model's VAE; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class FinalLatents:
    """The latents of one song, [frames, channels], and what its decoded samples were multiplied by (a scalar)."""

    values: torch.Tensor
    gain: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Both tensors."""
        return self.values, self.gain

    def to_host(self) -> "FinalLatents":
        """Start their copy to RAM."""
        return FinalLatents(*(each.to("cpu", non_blocking=True) for each in self.tensors))


@dataclass(frozen=True, slots=True, eq=False)
class SourceLatents:
    """Latents of source audio as they were read: [frames, channels] on the CPU, and the gain of the file."""

    values: torch.Tensor
    gain: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class PlacedLatents:
    """Latents of source audio in the song that is made from it: with frames of silence before and after them."""

    values: torch.Tensor
    gain: float = 1.0
    before: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpace:
    """VAE, channels and rate that latents belong to.

    Attributes:
        vae: fingerprint of the VAE.
        channels: of a frame.
        rate: frames a second.
    """

    vae: str
    channels: int
    rate: float

    @classmethod
    def of(cls, vae: Any, rate: float) -> "LatentSpace":
        """Return the space of a loaded VAE."""
        return cls(vae=_fingerprint(vae), channels=vae.config.decoder_input_channels, rate=rate)


def write_latents(latents: FinalLatents, path: Path, *, model: str, space: LatentSpace, gain: float) -> SideFile:
    """Write a song's latents, which are in RAM."""
    metadata = {
        "format": FORMAT,
        "model": model,
        "vae": space.vae,
        "latent_rate": f"{space.rate:g}",
        "gain": repr(gain),
    }
    path.write_bytes(save({_NAME: latents.values.contiguous()}, metadata))
    return SideFile(kind="latents", path=path, content_type=CONTENT_TYPE)


def read_latents(path: Path | None, space: LatentSpace, seconds: float) -> SourceLatents:
    """Read the latents of a song whose file has so many seconds of audio; None: they could not be fetched.

    Raises ``LatentsUnusable``.
    """
    if path is None:
        raise LatentsUnusable("they are not in the storage any more")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _require(metadata.get("format") == FORMAT, "they are in a format of another version")
            _require(metadata.get("vae") == space.vae, "they belong to another VAE")
            shape = tuple(file.get_slice(_NAME).get_shape())
            _require(len(shape) == 2 and shape[1] == space.channels, f"their shape is {list(shape)}")  # noqa: PLR2004 - a matrix
            off = abs(shape[0] - seconds * space.rate)
            _require(off <= _FRAMES_OFF, f"they have {shape[0]} frames, and its audio has {seconds:.2f} seconds")
            values = file.get_tensor(_NAME).float()
        gain = float(metadata["gain"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LatentsUnusable("they cannot be read") from error
    _require(bool(values.isfinite().all()) and math.isfinite(gain) and gain > 0, "they are not numbers")
    return SourceLatents(values, gain)


def _require(met: bool, reason: str) -> None:  # noqa: FBT001 - a condition
    if not met:
        raise LatentsUnusable(reason)


def _fingerprint(vae: Any) -> str:
    """Return a digest of the signs of weights at both ends of encoder and decoder.

    Signs are the same in every precision and on every device, with weight norm and without.
    """
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.decoder):
        weights = [module.weight for module in part.modules() if isinstance(module, torch.nn.Conv1d)]
        for weight in (weights[0], weights[-1]):
            signs = weight.detach().flatten()[:_SIGNS] > 0
            digest.update(bytes(signs.cpu().tolist()))
    return digest.hexdigest()[:16]
