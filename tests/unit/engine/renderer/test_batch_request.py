# SPDX-License-Identifier: Apache-2.0
"""What a job holds in the scheduler, and which songs are aligned together."""

import weakref
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch

from acestep_consumer.engine.renderer.batch_request import AudioCopy, BatchRequest, RequestCallbacks
from acestep_consumer.engine.renderer.scheduler import first_pack


def sample(frames: int = 2) -> Any:
    return SimpleNamespace(frames=frames, done=True, alignment=object(), final_latents=None)


def request_of(*samples: Any, weights: str = "base") -> BatchRequest:
    runner: Any = SimpleNamespace(parts=SimpleNamespace(dit=SimpleNamespace(patch=2)))
    lora: Any = weights
    prepared: Any = None
    audio: dict[int, Future[AudioCopy]] = {index: Future() for index in range(len(samples))}
    return BatchRequest(runner, lora, prepared, RequestCallbacks(), 0, audio, [], samples)


def test_a_decoded_song_is_not_held_by_a_job_with_more_songs() -> None:
    """Neither its audio nor its attention to the lyrics, each up to 120 MB."""
    request = request_of(first := sample(), sample())
    future, audio, matrices = request.audio[0], torch.zeros(2, 8), torch.zeros(2, 3, 4)
    request.set_matrices(first, AudioCopy.start(matrices))
    request.deliver(first, audio)

    song = future.result()
    assert song.matrices is not None
    kept = [weakref.ref(song.wait()), weakref.ref(song.matrices.wait())]
    del future, audio, matrices, song

    assert [each() for each in kept] == [None, None]
    assert not request.completed


def test_a_song_is_aligned_once_and_none_is_after_it_was_decoded() -> None:
    request = request_of(first := sample(), second := sample())
    assert request.unaligned == [first, second]
    request.set_matrices(first, None)
    assert request.unaligned == [second]
    request.deliver(second, torch.zeros(2, 8))
    assert (request.unaligned, request.finished) == ([], [first])


def test_songs_that_are_not_in_the_pack_take_none_of_its_tokens() -> None:
    """Of 6 tokens, a song of 3 leaves room for another of 3, whatever lies between them."""
    one, other = request_of(), request_of(weights="adapted")
    one.runner = other.runner
    songs = [(one, sample(6)), (other, sample(6)), (one, sample(8)), (one, sample(6)), (one, sample(2))]

    assert first_pack(songs, 6) == [songs[0], songs[3]]


def test_a_song_of_more_tokens_than_a_pack_is_aligned_alone() -> None:
    request = request_of()
    songs = [(request, sample(20)), (request, sample(2))]
    assert first_pack(songs, 6) == [songs[0]]
