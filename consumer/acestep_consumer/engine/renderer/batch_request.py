# SPDX-License-Identifier: Apache-2.0
"""A job in the batcher's hands, and what its own thread sees of it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache

import torch

from acestep_consumer.engine.renderer.lora import Lora
from acestep_consumer.engine.renderer.model_runner import ModelRunner
from acestep_consumer.engine.renderer.prepare import PreparedRequest
from acestep_consumer.engine.renderer.sample import Sample


@dataclass(frozen=True, slots=True)
class RequestCallbacks:
    """Who waits for a job: ``cancelled`` is asked between steps, ``progressed`` hears of denoising, 0 to 1."""

    cancelled: Callable[[], bool] = lambda: False
    progressed: Callable[[float], None] = lambda _: None


@dataclass(frozen=True, slots=True, eq=False)
class AudioCopy:
    """A song's samples on their way to RAM."""

    samples: torch.Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def leaving(cls, audio: torch.Tensor) -> "AudioCopy":
        """Start the copy of [channels, samples] to RAM and go on."""
        if audio.device.type != "cuda":
            return cls(audio.cpu())
        stream = _copies(audio.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            samples = audio.to("cpu", non_blocking=True)
            arrived = stream.record_event()
        audio.record_stream(stream)
        return cls(samples, arrived)

    def wait(self) -> torch.Tensor:
        """Return the samples, float32 [channels, samples], once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.samples


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """Copies to RAM have a stream of their own: they run beside the next pack, and nothing is ever recorded there.

    When a job's thread lets go of samples, torch notes that on the stream which copied them. On one that is being
    recorded as a graph, that would break the recording.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


@dataclass(frozen=True, slots=True, eq=False)
class BatchFutures:
    """A job's songs, each as soon as it is done.

    ``notes``: texts that were cut, and what was done for lack of memory; complete when the last song is done.
    """

    sounds: "tuple[Future[AudioCopy], ...]"
    notes: list[str]


@dataclass(slots=True, eq=False)
class BatchRequest:
    """A job from its draft to its last sound.

    ``bytes``: what its songs hold. ``alone``: nothing else may be there. ``waited``: for memory, at least once.
    """

    booth: ModelRunner
    lora: Lora | None
    draft: PreparedRequest
    watch: RequestCallbacks
    bytes: int
    performance: BatchFutures
    songs: Sequence[Sample] = ()
    alone: bool = False
    waited: bool = False
    _decoded: set[int] = field(default_factory=set)

    @property
    def kind(self) -> tuple[ModelRunner, Lora | None]:
        """Takes of one kind can share a pack."""
        return self.booth, self.lora

    @property
    def unfinished(self) -> list[Sample]:
        """Songs with steps to go."""
        return [song for song in self.songs if not song.done]

    @property
    def finished(self) -> list[Sample]:
        """Songs that are denoised and not decoded."""
        return [song for index, song in enumerate(self.songs) if song.done and index not in self._decoded]

    @property
    def over(self) -> bool:
        """Whether every song has its sound, or the reason why it has none."""
        return all(future.done() for future in self.performance.sounds)

    def tell(self) -> None:
        """Report how far the denoising is."""
        done, steps = sum(song.step for song in self.songs), sum(song.steps for song in self.songs)
        self.watch.progressed(done / steps)

    def deliver(self, song: Sample, sound: AudioCopy) -> None:
        """Hand over one song."""
        index = next(index for index, each in enumerate(self.songs) if each is song)
        self._decoded.add(index)
        self.performance.sounds[index].set_result(sound)

    def fail(self, error: BaseException) -> None:
        """End what is not done yet."""
        for future in self.performance.sounds:
            if not future.done():
                future.set_exception(error)
