# SPDX-License-Identifier: Apache-2.0
"""Tiled VAE decode: latents to audio over windows of many songs at once.

Windows have few shapes, so that each can be compiled once. They overlap by the decoder's receptive field: the result
is that of decoding each song in one piece, up to rounding.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import structlog
import torch
from torch import nn

from acestep_consumer.engine.renderer.errors import is_fatal, is_out_of_memory

log = structlog.get_logger()

# Latents that a window between two others adds; with its overlaps that is its length. Few lengths are few shapes to
# compile. At 25 latents a second, songs of 30, 60, 120 and 300 s fill 2, 4, 8 and 20 windows of the first kind with
# at most 4% to spare; the others are for songs too short for it, below 16 s and below 6 s.
_ADVANCES = (376, 120, 24)

# Windows that are decoded together. Not two: on an H200 cuDNN picks an algorithm for it that is five times slower.
_BATCHES = (8, 4)


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of a song, ``start`` to ``stop``, and the part of its audio that is kept; all in latents of the song."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def window_lengths(overlap: int) -> tuple[int, ...]:
    """Return the possible lengths of windows, longest first; shorter songs are decoded in one piece."""
    return tuple(advance + 2 * overlap for advance in _ADVANCES)


def layout(frames: int, overlap: int) -> tuple[Tile, ...]:
    """Cut a song of ``frames`` latents into windows of one length that keep each of its latents once, in order.

    The kept part is at least ``overlap`` latents from a cut; a song's own ends are no cuts. A song shorter than the
    shortest length is one window of its own length.
    """
    length = next((each for each in window_lengths(overlap) if each <= frames), frames)
    tiles: list[Tile] = []
    kept = 0
    while kept < frames:
        start = min(max(kept - overlap, 0), frames - length)
        stop = start + length
        tiles.append(Tile(start, stop, kept, frames if stop == frames else stop - overlap))
        kept = tiles[-1].keep_to
    return tuple(tiles)


def batch_sizes(tiles_at_once: int) -> tuple[int, ...]:
    """Return the possible sizes of batches of at most ``tiles_at_once`` windows, largest first: one or two of them.

    Raises:
        ValueError: ``tiles_at_once`` is below 1.
    """
    if tiles_at_once < 1:
        raise ValueError(f"tiles_at_once must be 1 or more, not {tiles_at_once}")
    return tuple(size for size in _BATCHES if size <= tiles_at_once) or (1,)


# torch compiles a function for 8 shapes by default, counted over all decoders of a process.
_RECOMPILE_LIMIT = 64

# Latents that the fused kernels are tried on, and the share by which their sound may differ from the plain decoder's.
# In bfloat16 both are off by 1 to 3% of the exact sound; a wrong kernel is off by all of it.
_CHECKED_LATENTS, _TOLERATED = 40, 0.1

_Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _SongTile:
    """A tile of the song with this index."""

    song: int
    tile: Tile


class TileDecoder(nn.Module):
    """The decoder of a VAE as diffusers has it (AutoencoderOobleck, weight norm removed), for many songs at once.

    It has a copy of the decoder's weights, on the VAE's device and in its precision. With ``compiled`` the first batch
    of a shape takes seconds to compile: ``warm_up`` does that ahead of the first song. With ``fused`` it runs the
    project's own kernels (``fused_decoder``); where these cannot be built or are wrong, as without it, after a warning.

    Raises:
        ValueError: the weight norm is not removed.
    """

    def __init__(self, vae: Any, *, compiled: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.hop: int = vae.hop_length  # samples per latent
        self.overlap = receptive_field(vae.decoder, self.hop)
        self._compiled = compiled
        self._channels: int = vae.config.decoder_input_channels
        self._audio_channels: int = vae.config.audio_channels
        self._original = (vae.decoder,)  # in a tuple: it is no part of this module
        _check_weight_norm(vae.decoder)
        fused_decoder = _fused(vae.decoder) if fused else None
        self._fused = fused_decoder is not None
        self._decoder = fused_decoder or self._plain()

    @torch.inference_mode(mode=False)  # whether the caller is in it or not: a compiled shape would be compiled for both
    @torch.no_grad()
    def decode(self, songs: Sequence[torch.Tensor], tiles_at_once: int = 8) -> list[torch.Tensor]:
        """Decode songs together; each gives the same audio as alone.

        ``songs``: latents [frames, channels] each. ``tiles_at_once`` bounds memory: no larger batch goes through the
        decoder. Returns audio per song, float32 [audio channels, frames × hop] on the decoder's device, not normalised.

        Raises:
            ValueError: ``tiles_at_once`` is below 1.
        """
        sizes = batch_sizes(tiles_at_once)
        decoded_songs = [self._empty_audio(len(song)) for song in songs]
        for tiles in self._batches(songs, sizes):
            windows = [songs[entry.song][entry.tile.start : entry.tile.stop] for entry in tiles]
            # A padded batch returns more windows than there are tiles.
            for entry, decoded in zip(tiles, self._decode_windows(windows, sizes), strict=False):
                self._copy_kept(decoded, entry.tile, decoded_songs[entry.song])
        return decoded_songs

    def warm_up(self, tiles_at_once: int = 8) -> Iterator[str]:
        """Compile every shape that ``decode`` uses with ``tiles_at_once``; yields a line for the log before each."""
        if self._fused:
            yield "the VAE decoder's fused kernels"
            self._check_fused()
        if self._fused:
            return
        sizes = batch_sizes(tiles_at_once) if self._compiled else ()
        for number, size in enumerate(sizes, start=1):
            yield f"compiling the VAE decoder, shape {number} of {len(sizes)}: {size} × {self._longest} latents"
            self.decode([torch.zeros(self._longest, self._channels)] * size, tiles_at_once)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _check_fused(self) -> None:
        """Compile the fused kernels and compare them with the plain decoder; use that one from now on if they fail."""
        fused: Any = self._decoder
        latents = torch.randn(1, _CHECKED_LATENTS, self._channels, generator=torch.Generator().manual_seed(0))
        latents = latents.to(self._weight)
        try:
            fused.compile_kernels()
            found = fused(latents).float()
        except Exception as error:
            if is_fatal(error) or is_out_of_memory(error):
                raise
            log.warning("the VAE decoder runs without fused kernels, which is slower: they failed", exc_info=error)
        else:
            plain = copy.deepcopy(self._original[0]).to(latents.device)
            expected = plain(latents.transpose(1, 2)).float()
            share = ((found - expected).norm() / expected.norm()).item()
            if share < _TOLERATED:
                return
            log.warning("the VAE decoder runs without fused kernels, which is slower: they are wrong", error=share)
        self._fused = False
        self._decoder = self._plain().to(latents.device)

    def _plain(self) -> nn.Module:
        decoder = to_conv2d(self._original[0])
        # The method and not the module, which would count as a second submodule with the same weights.
        self._run_tiles = _compiled(decoder.forward) if self._compiled else decoder.forward
        return decoder

    @property
    def _weight(self) -> torch.Tensor:
        """One of the decoder's weights: it has the device and the precision of all."""
        return next(chain(self._decoder.parameters(), self._decoder.buffers()))

    @property
    def _device(self) -> torch.device:
        return self._weight.device

    @property
    def _longest(self) -> int:
        """The one length that is compiled: each takes half a minute, and shorter songs are decoded quickly anyway."""
        return window_lengths(self.overlap)[0]

    def _empty_audio(self, frames: int) -> torch.Tensor:
        return torch.empty(self._audio_channels, frames * self.hop, dtype=torch.float32, device=self._device)

    def _batches(self, songs: Sequence[torch.Tensor], sizes: tuple[int, ...]) -> Iterator[list[_SongTile]]:
        """Yield batches of tiles of one length, from any songs; a song shorter than all lengths is alone."""
        by_length: defaultdict[int, list[_SongTile]] = defaultdict(list)
        for number, song in enumerate(songs):
            for tile in layout(len(song), self.overlap):
                by_length[tile.stop - tile.start].append(_SongTile(number, tile))
        for length, tiles in by_length.items():
            at_once = sizes[0] if length in window_lengths(self.overlap) else 1
            yield from (tiles[first : first + at_once] for first in range(0, len(tiles), at_once))

    def _decode_windows(self, windows: list[torch.Tensor], sizes: tuple[int, ...]) -> torch.Tensor:
        """Return the audio of windows, [latents, channels] each, all of one length."""
        if self._fused or len(windows[0]) != self._longest:
            return self._run(windows, self._decoder)
        size = min(size for size in sizes if size >= len(windows))
        # Uncompiled code on a CPU takes any number of windows without padding.
        fill = size - len(windows) if self._compiled or self._device.type != "cpu" else 0
        return self._run(windows + windows[-1:] * fill, self._run_tiles)

    def _run(self, windows: list[torch.Tensor], decoder: _Run) -> torch.Tensor:
        latents = torch.stack([window.to(self._weight) for window in windows])
        if self._fused:
            return decoder(latents)
        # Channels are innermost already: this is a view in the format channels_last.
        return decoder(latents.transpose(1, 2).unsqueeze(2)).squeeze(2)

    def _copy_kept(self, decoded: torch.Tensor, tile: Tile, audio: torch.Tensor) -> None:
        """Copy the kept part of a window, ``decoded``, into the song's ``audio``."""
        first, last = tile.keep_from * self.hop, tile.keep_to * self.hop
        offset = tile.start * self.hop
        audio[:, first:last] = decoded[:, first - offset : last - offset]


def _fused(decoder: nn.Module) -> nn.Module | None:
    """Return the decoder with fused kernels; None where there are none for it, or no Triton."""
    try:
        from acestep_consumer.engine.renderer.decoder import fused_decoder  # noqa: PLC0415 - not every platform has Triton
    except ImportError as error:
        log.warning("the VAE decoder runs without fused kernels, which is slower: no Triton", exc_info=error)
        return None
    return fused_decoder.FusedDecoder(decoder).eval() if fused_decoder.fits(decoder) else None


def _compiled(run: _Run) -> _Run:
    # fullgraph: after a graph break the rest would silently run uncompiled.
    compiled: _Run = torch.compile(run, dynamic=False, fullgraph=True)

    def with_recompile_limit(latents: torch.Tensor) -> torch.Tensor:
        # Per call: torch keeps its configuration per thread.
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):  # noqa: SLF001 - torch's documented configuration
            return compiled(latents)

    return with_recompile_limit


def to_conv2d(decoder: nn.Module) -> nn.Module:
    """Return a copy of ``decoder`` for [batch, channels, 1, length], in the memory format ``channels_last``.

    The arithmetic is the same. cuDNN and Triton have better kernels for it: on an H200, compiled, it takes 126 ms
    instead of 175 for 300 s of audio. Everything but the convolutions is diffusers' own and works with the extra
    dimension: Snake1d reshapes it away, the residual units use the last one.
    """
    _check_weight_norm(decoder)
    copied = copy.deepcopy(decoder)
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            copied.set_submodule(name, _conv2d(module))
    return copied.eval().requires_grad_(requires_grad=False)


def _check_weight_norm(decoder: nn.Module) -> None:
    if any(hasattr(module, "weight_g") for module in decoder.modules()):
        raise ValueError("remove the weight norm first: with it, weights are computed in each forward pass")


def _conv2d(conv: nn.Conv1d | nn.ConvTranspose1d) -> nn.Module:
    kind = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose1d) else nn.Conv2d
    flat = kind(
        conv.in_channels,
        conv.out_channels,
        kernel_size=(1, conv.kernel_size[0]),
        stride=(1, conv.stride[0]),
        padding=(0, int(conv.padding[0])),
        dilation=(1, conv.dilation[0]),
        bias=conv.bias is not None,
        device="meta",  # its weights are set below
    )
    weight = conv.weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last)
    flat.weight, flat.bias = nn.Parameter(weight), conv.bias
    return flat


def receptive_field(decoder: nn.Module, hop: int) -> int:
    """Return the number of latents on each side of its own that a sample depends on: 9 with ACE-Step's decoder.

    Walks the convolutions backwards from the ``hop`` samples of one latent. ``modules()`` lists them in the order in
    which they run; activations and shortcuts do not widen the field.
    """
    first, last = 0, hop - 1
    convolutions = [each for each in decoder.modules() if isinstance(each, nn.Conv1d | nn.ConvTranspose1d)]
    for conv in reversed(convolutions):
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        if isinstance(conv, nn.ConvTranspose1d):
            # Input i adds to outputs from i × stride - padding, one kernel wide.
            first, last = -((kernel - 1 - padding - first) // stride), (last + padding) // stride
        else:
            first, last = first - padding, last - padding + (kernel - 1) * conv.dilation[0]
    return max(-first, last)
