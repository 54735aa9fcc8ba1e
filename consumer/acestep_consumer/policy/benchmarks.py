# SPDX-License-Identifier: Apache-2.0
"""What was measured, or counted from the models' shapes: the figures that ``capacity`` reckons with, and their origin.

Times are of one NVIDIA H200 (143,771 MiB; torch 2.11, bf16, full shapes with random weights) unless a comment says
otherwise. Nothing here is a rule: rules are in ``tiers``, ``language`` and the renderer's ``budget``.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from acestep_consumer.policy.lm_choice import RESERVE_GB, Backend
from acestep_consumer.policy.tiers import LMS

GIB: Final = 2**30
MEASURED_ON: Final = "NVIDIA H200"

# Shapes of ACE-Step 1.5, not measurements.
TOKENS_PER_SECOND: Final = 12.5  # 25 latent frames a second, two to a DiT token
FRAMES_PER_SECOND: Final = 25
_BF16 = 2
_KV_HEADS_WIDTH = 8 * 128  # key-value heads × their width: the same in every DiT and every LM


@dataclass(frozen=True, slots=True)
class DitSize:
    """A size of DiT: parameters, layers, hidden width."""

    name: str
    parameters: int
    layers: int
    hidden: int

    @property
    def weights(self) -> int:
        """Bytes of the DiT alone."""
        return self.parameters * _BF16

    @property
    def condition_bytes(self) -> int:
        """Keys and values of one condition token, held twice: in the song and in its pack."""
        return 2 * 2 * self.layers * _KV_HEADS_WIDTH * _BF16


@dataclass(frozen=True, slots=True)
class LmSize:
    """A size of 5Hz LM: parameters (217,204 entries of vocabulary, embedding tied) and layers."""

    parameters: int
    layers: int

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.parameters * _BF16

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token of one sequence."""
        return 2 * self.layers * _KV_HEADS_WIDTH * _BF16


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """How fast a card is: dense bf16 matrix TFLOP/s with float32 sums, and memory GB/s, from the maker's data sheet."""

    tflops: float
    gigabytes_s: float


DIT_2B: Final = DitSize("2B", 1_575_000_000, layers=24, hidden=2048)
DIT_XL: Final = DitSize("XL 5B", 5_000_000_000, layers=32, hidden=2560)
DIT_SIZES: Final = (DIT_2B, DIT_XL)

# Parameters beside the DiT. Several models on one card share the text encoder and the VAE.
SHARED_PARTS: Final = (596_000_000, 169_000_000)  # text encoder, VAE
OWN_PARTS: Final = (608_000_000, 105_000_000, 105_000_000)  # condition encoder, audio tokenizer, detokenizer
# Measured: the 2B model takes 6.2 GiB when loaded, its parameters alone 5.88.
LOADED_BEYOND_PARAMETERS: Final = round(0.32 * GIB)

# DiT, packed: a step takes 23.3 ms for 3,750 tokens, and no step less than 4 ms. 2B turbo.
STEP_S_PER_TOKEN: Final = 6.2e-6
STEP_FLOOR_S: Final = 0.004
# What is left of a song's time in the whole renderer, which made 1,165 songs of 30 s a minute and 154 of 300 s. The
# VAE's decoder alone takes 126 ms for 300 s.
DECODE_S_PER_SECOND: Final = 0.18 / 300
PREPARE_S: Final = 0.02

# Memory of the renderer's work. 2B; wider models take more for a token.
STEP_BYTES_PER_TOKEN: Final = 47_000
TILE_BYTES: Final = round(0.72 * GIB)
FRAME_BYTES: Final = 31_000
CONDITION_TOKENS: Final = 700  # of a usual song; 2,305 at most

RESERVE_BYTES: Final = round(RESERVE_GB * GIB)
# Not measured, allowances inside the LM's memory: vLLM's context, activations and recorded graphs 1 GB, and the logits
# processor's 4 MB a row.
LM_OVERHEAD_BYTES: Final[Mapping[Backend, int]] = MappingProxyType({"vllm": 1_512_000_000, "pt": 0})
LM_PROMPT_TOKENS: Final = 250  # of each of the two sequences of a song
LM_SEQUENCES_PER_SONG: Final = 2  # guided: with the condition and without

LM_SIZES: Final[Mapping[str, LmSize]] = MappingProxyType(
    dict(
        zip(
            LMS,
            (LmSize(662_000_000, 28), LmSize(1_854_000_000, 28), LmSize(4_189_000_000, 36)),
            strict=True,
        )
    )
)

# Songs a minute of 300 s (1,500 codes each, guided), the LM alone on the card, by songs in flight.
_LM_RATE_S: Final = 300
_VLLM: Final[Mapping[str, tuple[tuple[int, float], ...]]] = MappingProxyType(
    {
        LMS[0]: ((1, 18.0), (4, 64.0), (64, 517.0)),
        LMS[1]: ((1, 16.3), (4, 48.0), (16, 168.0), (64, 350.0)),
        LMS[2]: ((1, 10.3), (16, 60.0), (64, 333.0)),
    }
)
# transformers was measured with the 1.7B model; the others are taken to differ from it as they do on vLLM.
_PT: Final = ((1, 4.3), (64, 166.0))
MOST_IN_LM: Final = 64
"""Songs in flight: more were not measured, and vLLM is started with room for 128 sequences, two a song."""

# Processor seconds that a second of stereo takes to encode, on one core of an AMD EPYC server. Noise, the hardest case.
ENCODE_S_PER_SECOND: Final[Mapping[str, float]] = MappingProxyType(
    {"mp3": 0.055, "aac": 0.05, "ogg": 0.013, "opus": 0.013, "flac": 0.002, "wav": 0.001, "wav32": 0.001}
)

# As nvidia-smi and torch name them, without "NVIDIA ".
SPEEDS: Final[Mapping[str, GpuSpeed]] = MappingProxyType(
    {
        "H200": GpuSpeed(989, 4800),
        "H100 80GB HBM3": GpuSpeed(989, 3350),
        "H100 PCIe": GpuSpeed(756, 2000),
        "A100-SXM4-80GB": GpuSpeed(312, 2039),
        "A100-SXM4-40GB": GpuSpeed(312, 1555),
        "A100 80GB PCIe": GpuSpeed(312, 1935),
        "A100-PCIE-40GB": GpuSpeed(312, 1555),
        "L40S": GpuSpeed(362, 864),
        "L40": GpuSpeed(181, 864),
        "L4": GpuSpeed(121, 300),
        "GeForce RTX 4090": GpuSpeed(165, 1008),
        "GeForce RTX 3090": GpuSpeed(71, 936),
    }
)
REFERENCE: Final = SPEEDS["H200"]


def speed_of(name: str) -> GpuSpeed | None:
    """Return the speed of the card with this name, None for one that is not in the table."""
    known = {each.casefold(): speed for each, speed in SPEEDS.items()}
    return known.get(" ".join(name.split()).casefold().removeprefix("nvidia "))


def lm_size(model: str) -> LmSize:
    """Return the size of an LM by name or path; one that is nobody's known size counts as the largest."""
    return LM_SIZES.get(_base(model), LM_SIZES[LMS[-1]])


def lm_songs_a_minute(model: str, backend: Backend, in_flight: int, duration_s: float) -> float:
    """Songs of ``duration_s`` seconds that the LM plans in a minute with so many in flight, alone on an H200.

    Between the measured points both axes are logarithmic. Codes alone count: metadata comes on top.
    """
    name = _base(model) if _base(model) in _VLLM else LMS[-1]
    rate = _between(_VLLM[name], in_flight)
    if backend == "pt":
        rate *= _between(_PT, in_flight) / _between(_VLLM[LMS[1]], in_flight)
    return rate * _LM_RATE_S / duration_s


def _base(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _between(points: tuple[tuple[int, float], ...], x: int) -> float:
    """Read a curve at ``x``, from the first point up; beyond the last it is flat."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right:
            return low * math.exp(math.log(high / low) * math.log(x / left) / math.log(right / left))
    return points[-1][1]
