# SPDX-License-Identifier: Apache-2.0
"""Output of a song: its samples from the decoder to the file - length, level, kept samples of the source, fades.

The level of a plain song is set on the device. A song that keeps samples of its source is put together on the CPU, in
the job's own thread: the kept samples are not scaled, so that they stay the source's to the bit.
"""

from dataclasses import dataclass

import torch

from acestep_consumer.engine.renderer.window import Window

MINUS_1_DB = 10 ** (-1 / 20)
_SILENCE = 1e-6


@dataclass(frozen=True, slots=True)
class OutputRules:
    """Rules for a song's samples: level, fades.

    Attributes:
        peak: what the peak is scaled to, 1 is full scale; None: no scaling.
        fade_in_s: length of a linear fade-in in seconds.
        fade_out_s: length of a linear fade-out in seconds.
        raises_new_part: whether a new part beside kept samples may be raised to ``peak``. Not beside a song of this
            product: its level was set when it was made, and what is made from it has that level too.
    """

    peak: float | None = MINUS_1_DB
    fade_in_s: float = 0.0
    fade_out_s: float = 0.0
    raises_new_part: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class KeptSamples:
    """The source's samples, [channels, samples], outside ``window``, with cross-fades of ``fade`` samples around it."""

    source: torch.Tensor
    window: Window
    fade: int


def invalid_if_zero(latents: torch.Tensor) -> torch.Tensor:
    """Return final latents, [frames, channels]; not-a-number if all are zero: no song, which fails when it is encoded.

    Nothing is copied to the host.
    """
    return torch.where(latents.any(), latents, torch.nan)


def limited(audio: torch.Tensor) -> torch.Tensor:
    """Return [channels, samples] with a peak above 1 brought to 1. Nothing is copied to the host."""
    return audio / audio.abs().amax().clamp(min=1.0)


def gain_of(audio: torch.Tensor, peak: float | None) -> torch.Tensor:
    """Return what ``normalised`` (``peak`` None: ``limited``) multiplies a song by, on its device."""
    loudest = audio.abs().amax()
    limit = 1.0 / loudest.clamp(min=1.0)
    return limit if peak is None else limit * _gain(loudest * limit, peak)


def normalised(audio: torch.Tensor, peak: float = MINUS_1_DB) -> torch.Tensor:
    """Return a song, [channels, samples], at the level of ACE-Step's pipeline: its peak at ``peak``, -1 dBFS.

    As in the pipeline, a peak above 1 is brought to 1 first, and silence stays as it is. Nothing is copied to the host:
    the caller does not wait for the GPU.
    """
    audio = limited(audio)
    return audio * _gain(audio, peak)


def spliced(audio: torch.Tensor, kept: KeptSamples, rules: OutputRules) -> torch.Tensor:
    """Return new audio, [channels, samples] on the CPU, with the source's samples outside the window.

    The new part alone is scaled: by the factor that brings the peak of the whole song to the peak of ``rules``.
    """
    length = min(audio.shape[-1], kept.source.shape[-1])
    window = Window(min(kept.window.start, length), min(kept.window.end, length), length)
    first, last = max(window.start - kept.fade, 0), min(window.end + kept.fade, length)
    mask = window.mask(fade=kept.fade)[first:last]
    source = kept.source[:, first:last]
    joined = kept.source[:, :length].clone()
    joined[:, first:last] = mask * audio[:, first:last] + (1.0 - mask) * source
    if rules.peak is not None:
        gain = _gain(joined, rules.peak)
        scaled = audio[:, first:last] * (gain if rules.raises_new_part else gain.clamp(max=1.0))
        joined[:, first:last] = mask * scaled + (1.0 - mask) * source
    return torch.cat([joined, audio[:, length:]], dim=-1)


def faded(audio: torch.Tensor, rules: OutputRules, sample_rate: int) -> torch.Tensor:
    """Return [channels, samples] with the fades of ``rules``; the given tensor where there are none."""
    samples = audio.shape[-1]
    rise = min(int(rules.fade_in_s * sample_rate), samples)
    fall = min(int(rules.fade_out_s * sample_rate), samples)
    if not rise and not fall:
        return audio
    audio = audio.clone()
    audio[:, :rise] *= torch.linspace(0.0, 1.0, rise)
    audio[:, samples - fall :] *= torch.linspace(1.0, 0.0, fall)
    return audio


def _gain(audio: torch.Tensor, peak: float) -> torch.Tensor:
    loudest = audio.abs().amax()
    return torch.where(loudest < _SILENCE, 1.0, peak / loudest.clamp(min=_SILENCE))
