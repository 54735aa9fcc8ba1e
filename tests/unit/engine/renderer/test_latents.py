# SPDX-License-Identifier: Apache-2.0
"""Files with a song's final latents: what is in them, and which are of no use."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from acestep_consumer.engine.renderer.latents import (
    FinalLatents,
    LatentSpace,
    LatentsUnusable,
    read_latents,
    write_latents,
)
from acestep_consumer.engine.renderer.output import gain_of, limited, normalised

SPACE = LatentSpace(vae="0123", channels=4, rate=25.0)


def written(folder: Path, values: torch.Tensor, *, gain: float = 1.5) -> Path:
    latents = FinalLatents(values.to(torch.float16), torch.tensor(gain))
    return write_latents(latents, folder / "0.latents.safetensors", model="turbo", space=SPACE, gain=gain).path


def test_latents_are_read_as_they_were_written_with_what_they_belong_to(tmp_path: Path) -> None:
    values = torch.randn(250, 4, generator=torch.Generator().manual_seed(1))
    path = written(tmp_path, values)
    read = read_latents(path, SPACE, seconds=10)
    assert torch.equal(read.values, values.to(torch.float16).float())
    assert read.gain == 1.5
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "acestep-latents-1",
            "model": "turbo",
            "vae": "0123",
            "latent_rate": "25",
            "gain": "1.5",
        }
    assert 2_000 < path.stat().st_size < 2_400  # 2 bytes × 4 channels × 250 frames, and the header


def test_an_mp3_may_be_a_little_longer_than_its_latents(tmp_path: Path) -> None:
    assert len(read_latents(written(tmp_path, torch.ones(250, 4)), SPACE, seconds=10.07).values) == 250


@pytest.mark.parametrize(
    ("space", "seconds", "reason"),
    [
        (replace(SPACE, vae="another"), 10, "they belong to another VAE"),
        (replace(SPACE, channels=64), 10, r"their shape is \[250, 4\]"),
        (SPACE, 11, "they have 250 frames, and its audio has 11.00 seconds"),
    ],
)
def test_latents_of_something_else_are_not_used(
    space: LatentSpace, seconds: float, reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path, torch.ones(250, 4))
    with pytest.raises(LatentsUnusable, match=reason):
        read_latents(path, space, seconds)


def test_damaged_and_missing_files_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(LatentsUnusable, match="not in the storage any more"):
        read_latents(None, SPACE, 10)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no safetensors")
    with pytest.raises(LatentsUnusable, match="cannot be read"):
        read_latents(damaged, SPACE, 10)
    with pytest.raises(LatentsUnusable, match="not numbers"):
        read_latents(written(tmp_path, torch.full((250, 4), torch.nan)), SPACE, 10)
    foreign = tmp_path / "foreign"
    save_file({"latents": torch.ones(250, 4)}, foreign)
    with pytest.raises(LatentsUnusable, match="format of another version"):
        read_latents(foreign, SPACE, 10)


def test_a_vae_is_the_same_in_every_precision_and_with_weight_norm() -> None:
    def vae(seed: int) -> SimpleNamespace:
        torch.manual_seed(seed)
        parts = [torch.nn.Sequential(torch.nn.Conv1d(2, 8, 7), torch.nn.Conv1d(8, 4, 3)) for _ in range(2)]
        config = SimpleNamespace(decoder_input_channels=4)
        return SimpleNamespace(encoder=parts[0], decoder=parts[1], config=config)

    first, same, other = vae(1), vae(1), vae(2)
    same.encoder, same.decoder = same.encoder.to(torch.bfloat16), same.decoder.to(torch.bfloat16)
    found = [LatentSpace.of(each, 25.0).vae for each in (first, same, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("loudest", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("peak", [None, 0.5])
def test_the_gain_is_what_a_song_is_multiplied_by(loudest: float, peak: float | None) -> None:
    audio = torch.linspace(-loudest, loudest, 101)[None]
    expected = limited(audio) if peak is None else normalised(audio, peak)
    assert torch.allclose(audio * gain_of(audio, peak), expected, atol=1e-6)


def test_silence_is_multiplied_by_one() -> None:
    assert gain_of(torch.zeros(2, 10), 0.5).item() == 1.0
