# SPDX-License-Identifier: Apache-2.0
"""One job inside the scheduler, and the futures through which the job's own thread gets its audio."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache

import torch

from acestep_consumer.engine.renderer.denoising.sample import Sample
from acestep_consumer.engine.renderer.latents import FinalLatents
from acestep_consumer.engine.renderer.lora import Loras
from acestep_consumer.engine.renderer.lyrics.lyric_alignment import LyricTokens
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.prepare import PreparedRequest


@dataclass(frozen=True, slots=True)
class RequestCallbacks:
    """Callbacks of one job, called on the device's thread between steps.

    ``cancelled`` tells whether nobody waits for the job any more; ``progressed`` gets the denoised part, 0 to 1.
    """

    cancelled: Callable[[], bool] = lambda: False
    progressed: Callable[[float], None] = lambda _: None


@dataclass(frozen=True, slots=True, eq=False)
class AudioCopy:
    """A device-to-host copy of one song's audio; ``copied`` is None where the copy was synchronous.

    ``latents``: the song's final latents, copied with it, where they are kept. ``matrices``: a copy of its own, of what
    the times of the lyrics are found from (``lyric_alignment``); None: the song is not aligned.
    """

    audio: torch.Tensor
    copied: torch.cuda.Event | None = None
    latents: FinalLatents | None = None
    matrices: "AudioCopy | None" = None

    @classmethod
    def start(
        cls, audio: torch.Tensor, latents: FinalLatents | None = None, matrices: "AudioCopy | None" = None
    ) -> "AudioCopy":
        """Start the copy of [channels, samples] to RAM without waiting for it."""
        if audio.device.type != "cuda":
            return cls(audio.cpu(), latents=latents and latents.to_host(), matrices=matrices)
        stream = _copy_stream(audio.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_host = audio.to("cpu", non_blocking=True)
            latents_on_host = latents and latents.to_host()
            copied = stream.record_event()
        for tensor in (audio, *(latents.tensors if latents else ())):
            tensor.record_stream(stream)
        return cls(on_host, copied, latents_on_host, matrices)

    def wait(self) -> torch.Tensor:
        """Return the audio, float32 [channels, samples], once it is in RAM."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.audio


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to RAM: they run beside the next batch, and no graph is ever captured on it.

    When a job's thread frees its audio, torch records that on the stream that copied it. On a stream that is being
    captured as a CUDA graph, that would invalidate the capture.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


@dataclass(frozen=True, slots=True, eq=False)
class BatchFutures:
    """Futures of one job's songs, in the order of its seeds; each is set as soon as that song is decoded.

    ``warnings``: texts that were truncated, and what was reduced for lack of memory; complete with the last song.
    ``lyrics``: what the songs are aligned with; None: nothing.
    """

    audio: "tuple[Future[AudioCopy], ...]"
    warnings: list[str]
    lyrics: LyricTokens | None = None


@dataclass(slots=True, eq=False)
class BatchRequest:
    """A job in the scheduler, from its prepared inputs to its last song.

    ``bytes``: device memory that its samples take. ``audio``: futures of the songs that are not decoded yet, by index;
    a song that is decoded is no longer held here, so that its job can free it. ``warnings``: those of its
    ``BatchFutures``. ``exclusive``: no other job may be on the device with it.
    ``waited``: it had to wait for memory at least once. ``rank``: its place among those that have not begun.
    ``keep_latents``: whether the final latents are copied with the audio.
    """

    runner: ModelRunner
    lora: Loras | None
    prepared: PreparedRequest
    callbacks: RequestCallbacks
    bytes: int
    audio: dict[int, Future[AudioCopy]]
    warnings: list[str]
    samples: Sequence[Sample] = ()
    exclusive: bool = False
    waited: bool = False
    rank: float = 0.0
    keep_latents: bool = False
    _matrices: dict[int, AudioCopy | None] = field(default_factory=dict)

    @property
    def batch_key(self) -> tuple[ModelRunner, Loras | None]:
        """The weights that the job needs: requests with equal keys can share a forward pass."""
        return self.runner, self.lora

    @property
    def begun(self) -> bool:
        """Whether one of its samples has been through a denoising step."""
        return any(sample.step for sample in self.samples)

    @property
    def unfinished(self) -> list[Sample]:
        """Samples with denoising steps left."""
        return [sample for sample in self.samples if not sample.done]

    @property
    def finished(self) -> list[Sample]:
        """Samples that are denoised and not decoded yet."""
        return [sample for index, sample in enumerate(self.samples) if sample.done and index in self.audio]

    @property
    def unaligned(self) -> list[Sample]:
        """Samples that are denoised and have yet to be aligned with their lyrics."""
        return [
            sample
            for index, sample in enumerate(self.samples)
            if sample.alignment is not None and sample.done and index in self.audio and index not in self._matrices
        ]

    def set_matrices(self, sample: Sample, matrices: AudioCopy | None) -> None:
        """Keep what the alignment of one song has found until the song is decoded; None: nothing."""
        self._matrices[self._index(sample)] = matrices

    @property
    def completed(self) -> bool:
        """Whether every song has its audio or its error."""
        return all(future.done() for future in self.audio.values())

    def report_progress(self) -> None:
        """Report the part of all denoising steps that is done."""
        done, steps = sum(sample.step for sample in self.samples), sum(sample.steps for sample in self.samples)
        self.callbacks.progressed(done / steps)

    def deliver(self, sample: Sample, audio: torch.Tensor) -> None:
        """Set the future of one song, [channels, samples] on the device, with all that was kept for it."""
        index = self._index(sample)
        latents = sample.final_latents if self.keep_latents else None
        self.audio.pop(index).set_result(AudioCopy.start(audio, latents, self._matrices.pop(index, None)))

    def _index(self, sample: Sample) -> int:
        return next(index for index, each in enumerate(self.samples) if each is sample)

    def fail(self, error: BaseException) -> None:
        """Set the error on every song that has no audio yet."""
        for future in self.audio.values():
            if not future.done():
                future.set_exception(error)
