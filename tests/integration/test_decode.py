# SPDX-License-Identifier: Apache-2.0
"""Decoding songs in tiles gives the sound of decoding each in one piece."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AceStepPipeline, AutoencoderOobleck
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.engine.renderer.decoder.vae_decode import (
    TileDecoder,
    batch_sizes,
    layout,
    receptive_field,
    window_lengths,
)
from acestep_consumer.engine.renderer.output import normalised
from acestep_consumer.engine.renderer.quiet_imports import quietly
from acestep_consumer.engine.testing.tiny_checkpoint import TURBO

REAL_RATIOS = [2, 4, 4, 6, 10]
# Same blocks, 8 samples a latent: long songs in no time. It sees 19 latents far, more than the real one with its 9.
BRISK_RATIOS = [2, 4]


def random_vae(ratios: Sequence[int], multiples: Sequence[int], channels: int = 4) -> Any:
    """A VAE whose every weight, bias and activation parameter matters, at about the level of real ones."""
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(3)
        vae = AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=list(ratios),
            channel_multiples=list(multiples),
            decoder_channels=channels,
            decoder_input_channels=channels,
        )
        for name, parameter in vae.decoder.named_parameters():
            if name.rpartition(".")[2] in ("alpha", "beta", "bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return ready(vae)


def ready(vae: Any) -> Any:
    for module in vae.modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)
    return vae.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def brisk() -> Any:
    return random_vae(BRISK_RATIOS, [1, 2])


@pytest.fixture(scope="module")
def wide() -> Any:
    return random_vae(REAL_RATIOS, [1, 2, 3, 4, 5], channels=6)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoints: Path) -> Any:
    with quietly():
        return ready(AutoencoderOobleck.from_pretrained(tiny_checkpoints / TURBO / "vae"))


def latents(frames: int, seed: int = 0, channels: int = 4) -> torch.Tensor:
    return torch.randn(frames, channels, generator=torch.Generator().manual_seed(seed))


def in_one_piece(vae: Any, song: torch.Tensor) -> torch.Tensor:
    decoded: torch.Tensor = vae.decode(song.T.unsqueeze(0)).sample[0]
    return decoded


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def seams(frames: int, overlap: int) -> list[int]:
    return [tile.keep_to for tile in layout(frames, overlap)[:-1]]


def around_the_ladder(overlap: int) -> list[int]:
    """One latent less, as many and one more than each length."""
    return [length + extra for length in window_lengths(overlap) for extra in (-1, 0, 1)]


# --- Layout


overlaps, song_lengths = st.integers(0, 40), st.integers(1, 20_000)


@given(frames=song_lengths, overlap=overlaps)
def test_each_latent_is_kept_once_and_in_order(frames: int, overlap: int) -> None:
    tiles = layout(frames, overlap)
    assert (tiles[0].keep_from, tiles[-1].keep_to) == (0, frames)
    assert all(one.keep_to == other.keep_from for one, other in pairwise(tiles))
    assert all(tile.keep_from < tile.keep_to for tile in tiles)


@given(frames=song_lengths, overlap=overlaps)
def test_windows_lie_inside_the_song_and_have_one_length_of_the_ladder(frames: int, overlap: int) -> None:
    tiles = layout(frames, overlap)
    assert all(0 <= tile.start < tile.stop <= frames for tile in tiles)
    (length,) = {tile.stop - tile.start for tile in tiles}
    longest_that_fits = max((each for each in window_lengths(overlap) if each <= frames), default=frames)
    assert length == longest_that_fits


@given(frames=song_lengths, overlap=overlaps)
def test_what_is_kept_lies_an_overlap_away_from_every_cut(frames: int, overlap: int) -> None:
    for tile in layout(frames, overlap):
        assert tile.start == 0 or tile.keep_from - tile.start >= overlap
        assert tile.stop == frames or tile.stop - tile.keep_to >= overlap


@pytest.mark.parametrize(("seconds", "tiles"), [(30, 2), (60, 4), (120, 8), (300, 20), (600, 40)])
def test_usual_songs_fill_their_tiles(seconds: int, tiles: int) -> None:
    overlap = 9
    assert len(layout(25 * seconds, overlap)) == tiles
    assert 25 * seconds >= 0.96 * ((window_lengths(overlap)[0] - 2 * overlap) * tiles + 2 * overlap)


def test_few_batch_sizes_are_used_and_two_is_none_of_them() -> None:
    assert [batch_sizes(at_once) for at_once in range(1, 10)] == [(1,)] * 3 + [(4,)] * 4 + [(8, 4)] * 2
    with pytest.raises(ValueError, match="tiles_at_once must be 1 or more, not 0"):
        batch_sizes(0)


# --- How far the decoder sees


def frames_changed_by_a_latent(vae: Any, frame: int, frames: int) -> list[int]:
    """The latents whose samples change with latent ``frame``: what reaches how far, by experiment and exactly."""
    song = latents(frames, channels=vae.config.decoder_input_channels)
    other = song.clone()
    other[frame] += 100
    changed = (in_one_piece(vae, song) != in_one_piece(vae, other)).any(dim=0)
    return changed.view(frames, vae.hop_length).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize(("vae", "expected"), [("wide", 9), ("brisk", 19)])
def test_the_decoder_sees_as_far_as_its_kernels_say(vae: str, expected: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(vae)
    seen = receptive_field(model.decoder, model.hop_length)
    changed = frames_changed_by_a_latent(model, 30, 61)
    assert seen == expected
    assert (changed[0], changed[-1]) == (30 - seen, 30 + seen)


# --- Sound


def test_a_song_of_any_length_sounds_as_in_one_piece(brisk: Any) -> None:
    decoder = TileDecoder(brisk)
    for frames in (1, 2, 39, 41, *around_the_ladder(decoder.overlap), 750, 751, 2_500, 15_000):
        song = latents(frames)
        assert error(decoder.decode([song])[0], in_one_piece(brisk, song)) < 1e-5, frames


@pytest.mark.parametrize("frames", [1, 41, 42, 139, 395])
def test_a_song_of_the_tiny_model_sounds_as_in_one_piece(frames: int, tiny: Any) -> None:
    song = latents(frames)
    (ours,) = TileDecoder(tiny).decode([song])
    assert ours.shape == (2, frames * 1_920)
    assert error(ours, in_one_piece(tiny, song)) < 1e-5


def test_no_seam_is_louder_than_rounding(wide: Any) -> None:
    decoder, song = TileDecoder(wide), latents(260, channels=6)
    ours, theirs = decoder.decode([song])[0], in_one_piece(wide, song)
    at_seams = [
        error(ours[:, first:last], theirs[:, first:last])
        for first, last in (((seam - 9) * 1_920, (seam + 9) * 1_920) for seam in seams(260, decoder.overlap))
    ]
    assert len(at_seams) == 2
    assert max(at_seams) < 2e-6 * theirs.abs().max().item()


def test_songs_decoded_together_sound_as_each_alone(brisk: Any) -> None:
    decoder = TileDecoder(brisk)
    songs = [latents(frames, seed=frames) for frames in (1_000, 3, 500, 70, 2_500, 170, 66, 900, 250, 66)]
    for song, together in zip(songs, decoder.decode(songs), strict=True):
        assert error(together, in_one_piece(brisk, song)) < 1e-5


@pytest.mark.parametrize("tiles_at_once", range(1, 10))
def test_the_batch_changes_no_song_and_is_never_exceeded(
    tiles_at_once: int, brisk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = TileDecoder(brisk)
    batches = record_batches(decoder, monkeypatch)
    songs = [latents(frames, seed=frames) for frames in (1_900, 500, 170, 750)]
    decoded = decoder.decode(songs, tiles_at_once)
    assert all(error(ours, in_one_piece(brisk, song)) < 1e-5 for song, ours in zip(songs, decoded, strict=True))
    assert max(batches) <= tiles_at_once


def test_batches_of_a_compiled_decoder_are_filled_up_to_few_sizes(brisk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TileDecoder(brisk)
    decoder._compiled = True
    batches = record_batches(decoder, monkeypatch)
    for frames in (750, 2_000, 5_000, 170, 70):
        song = latents(frames)
        assert error(decoder.decode([song])[0], in_one_piece(brisk, song)) < 1e-5
    assert set(batches) == {8, 4}


def record_batches(decoder: TileDecoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through the decoder from now on."""
    batches: list[int] = []
    run: Callable[[torch.Tensor], torch.Tensor] = decoder._run_tiles

    def recorded(windows: torch.Tensor) -> torch.Tensor:
        assert windows.is_contiguous(memory_format=torch.channels_last)
        batches.append(len(windows))
        return run(windows)

    monkeypatch.setattr(decoder, "_run_tiles", recorded)
    return batches


def test_latents_of_another_precision_are_taken_and_the_sound_is_float32(brisk: Any) -> None:
    song = latents(500).double()
    with torch.inference_mode():
        (ours,) = TileDecoder(brisk).decode([song])
    assert ours.dtype == torch.float32
    assert not ours.is_inference()
    assert error(ours, in_one_piece(brisk, song.float())) < 1e-5


def test_no_songs_give_no_sounds(brisk: Any) -> None:
    assert TileDecoder(brisk).decode([]) == []


def test_the_decoder_is_moved_without_the_vae_it_was_made_from(brisk: Any) -> None:
    moved = TileDecoder(brisk).to(torch.float64)
    assert {parameter.dtype for parameter in moved.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in brisk.parameters()} == {torch.float32}
    assert error(moved.decode([latents(500)])[0], in_one_piece(brisk, latents(500))) < 1e-5


def test_a_vae_with_weight_norm_is_refused() -> None:
    with quietly(), pytest.raises(ValueError, match="remove the weight norm first"):
        TileDecoder(AutoencoderOobleck(downsampling_ratios=[2], channel_multiples=[1], decoder_channels=4))


# --- Compiled


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each shape, as for a card, and run it as it is: a C++ compiler takes a minute a shape."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("traced")
def test_a_warm_decoder_compiles_no_more_and_sounds_the_same() -> None:
    vae = random_vae([2], [1])
    decoder = TileDecoder(vae, compiled=True)
    lines = list(decoder.warm_up(tiles_at_once=4))
    assert len(lines) == 1
    longest = window_lengths(decoder.overlap)[0]
    assert lines[0] == f"compiling the VAE decoder, shape 1 of 1: 4 × {longest} latents"
    songs = [latents(frames) for frames in (2_000, 200, 100, 8)]
    with torch.compiler.set_stance("fail_on_recompile"):
        decoded = decoder.decode(songs, tiles_at_once=4)
        with torch.inference_mode():
            decoder.decode([latents(750)], tiles_at_once=4)
    assert all(error(ours, in_one_piece(vae, song)) < 1e-5 for song, ours in zip(songs, decoded, strict=True))


@pytest.mark.usefixtures("traced")
def test_two_decoders_with_every_shape_each_stay_below_torchs_limit() -> None:
    decoders = [TileDecoder(random_vae([2], [1]), compiled=True) for _ in range(2)]
    lines = [line for decoder in decoders for at_once in (8, 4, 1) for line in decoder.warm_up(at_once)]
    assert len(lines) == 2 * (2 + 1 + 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for at_once in (1, 4, 8):
            decoders[0].decode([latents(2_000), latents(170), latents(64)], at_once)


def test_a_decoder_that_is_not_compiled_has_nothing_to_warm(brisk: Any) -> None:
    assert list(TileDecoder(brisk).warm_up()) == []


# --- Level


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoints: Path) -> Any:
    with quietly():
        loaded = AceStepPipeline.from_pretrained(tiny_checkpoints / TURBO, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# Below 1e-6 diffusers makes silence louder; ACE-Step itself leaves it, and so do we (golden case output_quiet_latents).
@pytest.mark.parametrize("peak", [0.0, 2e-6, 0.2, 1.0, 3.5])
def test_a_song_leaves_at_the_level_of_the_plain_pipeline(
    peak: float, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = latents(2, seed=1, channels=5_000)
    decoded *= peak / decoded.abs().max()
    monkeypatch.setattr(pipeline.vae, "decode", lambda _: SimpleNamespace(sample=decoded.unsqueeze(0)))
    theirs = pipeline(prompt="jazz", lyrics="", audio_duration=1.0, num_inference_steps=1, output_type="pt").audios[0]
    assert torch.equal(normalised(decoded), theirs)
