# SPDX-License-Identifier: Apache-2.0
"""Measurements, and figures that follow from the models' shapes: the data of ``sizing``, with their origin.

Times were measured on one NVIDIA H200 (143,771 MiB; torch 2.11, bf16, full shapes with random weights) unless a comment
says otherwise. The rules are elsewhere: ``tiers``, ``lm_choice`` and ``memory_budget``.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from acestep_consumer.policy.memory_budget import StepGraphLimits
from acestep_consumer.policy.tiers import LMS

Backend = Literal["vllm", "pt"]
"""The LM's: vLLM, or PyTorch with transformers."""

GIB: Final = 2**30
MEASURED_ON: Final = "NVIDIA H200"
WHOLE_WORKERS: Final = (
    "144 to 147 songs of 300 s a minute as FLAC, with the 1.7B LM and 96 jobs at once, and 205 to 219 without "
    "thinking, 32 at once"
)
UNCOMPILED: Final = "an H200 made 70 songs of 300 s a minute in place of 207; the figures are those of compiled ones"

# Shapes of ACE-Step 1.5, not measurements.
TOKENS_PER_SECOND: Final = 12.5  # 25 latent frames a second, two to a DiT token
_BF16 = 2
_KV_HEADS_WIDTH = 8 * 128  # key-value heads × their width: the same in every DiT and every LM
# Of a token in a CUDA graph: latents and context of its two frames, the number of its branch, cosines and sines.
_GRAPH_TOKEN_BYTES = 2 * (64 + 128) * _BF16 + 8 + 2 * 128 * _BF16


# Of a DiT's parameters, those of the linear layers in its transformer, which alone are quantized.
_DIT_IN_LAYERS: Final = 0.96


def _weights(parameters: int, in_int8: int) -> int:
    """Return the bytes of so many parameters, some of them in int8. Scales, one a row, are a thousandth of that."""
    return (parameters - in_int8) * _BF16 + in_int8


@dataclass(frozen=True, slots=True)
class DitSize:
    """A size of DiT: parameters, layers, hidden width; ``int8``: whether the layers' weights are in int8."""

    name: str
    parameters: int
    layers: int
    hidden: int
    int8: bool = False

    @property
    def weights(self) -> int:
        """Bytes of the DiT alone."""
        return _weights(self.parameters, round(_DIT_IN_LAYERS * self.parameters) if self.int8 else 0)

    @property
    def condition_bytes(self) -> int:
        """Bytes of keys and values of one condition token, stored twice: in the song and in its batch."""
        return 2 * 2 * self.layers * _KV_HEADS_WIDTH * _BF16

    def graph_bytes(self, limits: StepGraphLimits) -> int:
        """Bytes of the inputs of CUDA graphs, which the worker measures with the weights."""
        return limits.condition_tokens * self.condition_bytes // 2 + limits.tokens * _GRAPH_TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class LmSize:
    """A size of 5Hz LM: parameters, layers, and the width of a token's keys (its values are as wide) in a layer.

    ``embedded``: the parameters of embedding and head; ``int8``: whether the weights of all others are in int8.
    """

    parameters: int
    layers: int
    keys_width: int = _KV_HEADS_WIDTH
    embedded: int = 0
    int8: bool = False

    @property
    def weights(self) -> int:
        """Bytes."""
        return _weights(self.parameters, self.parameters - self.embedded if self.int8 else 0)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token of one sequence."""
        return 2 * self.layers * self.keys_width * _BF16


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """A GPU's speed from its data sheet: dense bf16 TFLOP/s with float32 accumulation, and memory GB/s.

    ``hopper``: of the generation that was measured, whose VAE decoder is fused.
    """

    tflops: float
    gigabytes_s: float
    hopper: bool = False


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU whose speed is known; ``memory_mib`` as nvidia-smi reports it."""

    name: str
    speed: GpuSpeed
    memory_mib: int

    @property
    def memory_gib(self) -> float:
        """Its memory in GiB."""
        return self.memory_mib / 1024


DIT_2B: Final = DitSize("2B", 1_575_000_000, layers=24, hidden=2048)
DIT_XL: Final = DitSize("XL 5B", 5_000_000_000, layers=32, hidden=2560)
DIT_SIZES: Final = (DIT_2B, DIT_XL)

# Parameters beside the DiT. Several models on one GPU share the text encoder and the VAE.
SHARED_PARTS: Final = (596_000_000, 169_000_000)  # text encoder, VAE
OWN_PARTS: Final = (608_000_000, 105_000_000, 105_000_000)  # condition encoder, audio tokenizer, detokenizer
# Measured: the 2B model takes 6.2 GiB when loaded, its parameters alone 5.88.
LOADED_BEYOND_PARAMETERS: Final = round(0.32 * GIB)

# DiT, 2B turbo, batched: a step takes 23.3 ms for 3,750 tokens, and at least 4 ms.
STEP_S_PER_TOKEN: Final = 6.2e-6
STEP_FLOOR_S: Final = 0.004
# The rest of a song's time in the renderer. With the fused decoder a worker without thinking makes 207 songs of 300 s
# and 1,900 of 30 s per minute, 32 at once; without it the renderer made 154 of 300 s. Other cards than Hopper's decode
# without it.
FUSED_DECODE_S_PER_SECOND: Final = 0.1 / 300
DECODE_S_PER_SECOND: Final = 0.2 / 300
PREPARE_S: Final = 0.003

# Offloaded weights are copied to the GPU for each pack. Limited to 8 GB, an H200 (PCIe 5) rendered 203 songs of 240 s a
# minute, two in a pack, and 206 limited to 12 GB; before page-locked RAM 69. Other cards: PCIe 4, by its specification.
HOPPER_BUS_BYTES_S: Final = 50e9
BUS_BYTES_S: Final = 25e9

MPS_GAIN: Final = 1.14
"""Songs per minute with LM and renderer on one GPU at the same time, to those by turns: 135 to 118 as MP3, 64 jobs."""
MPS_FULL_GAIN: Final = 1.03
"""The same with as many songs in the LM as it gains from. Each of the two alone is then at the GPU's power limit
(694 W, 100 J a song in the LM and 198 in the renderer), and so are both together: 145 songs per minute, 287 J."""
MPS_GAINS_FROM: Final = 16
"""Songs in the LM. With eight, limited to 16 and 24 GB, 72 and 80 songs of 240 s a minute were made, as by turns."""

# Working memory of the renderer, 2B; wider models need more per token.
STEP_BYTES_PER_TOKEN: Final = 47_000
TILE_BYTES: Final = round(0.72 * GIB)
FRAME_BYTES: Final = 31_000
CONDITION_TOKENS: Final = 700  # of a typical song; 2,305 at most

RESERVE_GB: Final = 1.0
"""Reserved for the renderer's CUDA context and fragmentation. An allowance, not measured."""
RESERVE_BYTES: Final = round(RESERVE_GB * GIB)
LM_PROMPT_TOKENS: Final = 250  # of each of the two sequences of a song
LM_SEQUENCES_PER_SONG: Final = 2  # guided: conditional and unconditional

# Vocabulary 217,204, tied embedding, 1,024, 2,048 and 2,560 wide.
_VOCABULARY: Final = 217_204
LM_SIZES: Final[Mapping[str, LmSize]] = MappingProxyType(
    dict(
        zip(
            LMS,
            (
                LmSize(662_000_000, 28, embedded=_VOCABULARY * 1024),
                LmSize(1_854_000_000, 28, embedded=_VOCABULARY * 2048),
                LmSize(4_189_000_000, 36, embedded=_VOCABULARY * 2560),
            ),
            strict=True,
        )
    )
)

# Songs per minute of 300 s (1,500 codes each, guided), the LM alone on the GPU, by concurrent songs.
_LM_RATE_S: Final = 300
_VLLM: Final[Mapping[str, tuple[tuple[int, float], ...]]] = MappingProxyType(
    {
        LMS[0]: ((1, 18.0), (4, 64.0), (64, 517.0)),
        # With 84, 96 and 128 songs 460, 416 and 446 were made, the GPU at its power limit: 440 counts for all of them.
        LMS[1]: ((1, 18.1), (4, 48.0), (16, 168.0), (64, 350.0), (84, 440.0)),
        LMS[2]: ((1, 10.3), (16, 60.0), (64, 333.0)),
    }
)
# transformers was measured with the 1.7B model; the others are scaled by their ratio on vLLM.
_PT: Final = ((1, 4.3), (64, 166.0))

# CPU seconds to encode a second of stereo, on one core of an AMD EPYC server: noise or tones, whichever takes longer
# (`infra/dev bench encode`).
ENCODE_S_PER_SECOND: Final[Mapping[str, float]] = MappingProxyType(
    {"mp3": 0.011, "aac": 0.05, "ogg": 0.013, "opus": 0.013, "flac": 0.002, "wav": 0.001, "wav32": 0.001}
)

REFERENCE: Final = GpuSpeed(989, 4800, hopper=True)
"""The measured GPU's."""

# Names and MiB as nvidia-smi prints them.
_GPUS: Final = (
    GpuModel("NVIDIA H200", REFERENCE, 143_771),
    GpuModel("NVIDIA H100 80GB HBM3", GpuSpeed(989, 3350, hopper=True), 81_559),
    GpuModel("NVIDIA H100 PCIe", GpuSpeed(756, 2000, hopper=True), 81_559),
    GpuModel("NVIDIA A100-SXM4-80GB", GpuSpeed(312, 2039), 81_920),
    GpuModel("NVIDIA A100-SXM4-40GB", GpuSpeed(312, 1555), 40_960),
    GpuModel("NVIDIA A100 80GB PCIe", GpuSpeed(312, 1935), 81_920),
    GpuModel("NVIDIA A100-PCIE-40GB", GpuSpeed(312, 1555), 40_960),
    GpuModel("NVIDIA H20", GpuSpeed(148, 4000, hopper=True), 97_871),
    GpuModel("NVIDIA L40S", GpuSpeed(362, 864), 46_068),
    GpuModel("NVIDIA L40", GpuSpeed(181, 864), 46_068),
    GpuModel("NVIDIA L4", GpuSpeed(121, 300), 23_034),
    GpuModel("NVIDIA A40", GpuSpeed(150, 696), 46_068),
    GpuModel("NVIDIA A10", GpuSpeed(125, 600), 23_028),
    GpuModel("NVIDIA RTX 6000 Ada Generation", GpuSpeed(364, 960), 49_140),
    GpuModel("NVIDIA RTX A6000", GpuSpeed(155, 768), 49_140),
    GpuModel("NVIDIA GeForce RTX 5090", GpuSpeed(209, 1792), 32_607),
    GpuModel("NVIDIA GeForce RTX 5080", GpuSpeed(113, 960), 16_303),
    GpuModel("NVIDIA GeForce RTX 5070 Ti", GpuSpeed(88, 896), 16_303),
    GpuModel("NVIDIA GeForce RTX 4090", GpuSpeed(165, 1008), 24_564),
    GpuModel("NVIDIA GeForce RTX 4080 SUPER", GpuSpeed(104, 736), 16_376),
    GpuModel("NVIDIA GeForce RTX 4080", GpuSpeed(97, 717), 16_376),
    GpuModel("NVIDIA GeForce RTX 4070 Ti SUPER", GpuSpeed(88, 672), 16_376),
    GpuModel("NVIDIA GeForce RTX 4070 Ti", GpuSpeed(80, 504), 12_282),
    GpuModel("NVIDIA GeForce RTX 4070", GpuSpeed(58, 504), 12_282),
    GpuModel("NVIDIA GeForce RTX 3090 Ti", GpuSpeed(80, 1008), 24_564),
    GpuModel("NVIDIA GeForce RTX 3090", GpuSpeed(71, 936), 24_576),
    GpuModel("NVIDIA GeForce RTX 3080", GpuSpeed(59, 760), 10_240),
    GpuModel("NVIDIA GeForce RTX 3060", GpuSpeed(25, 360), 12_288),
)
_SAME_SIZE: Final = 0.05
_MEMORY = re.compile(r"(\d+)g(?:i?b)?")
_MEMORY_OFF_GIB: Final = 2  # of what is in a card's name: an "L4 24GB" reports 22.5
_MODEL_NUMBER = re.compile(r"(?!\d+gb$)[a-z]*\d+[a-z]*")


def gpu_names() -> tuple[str, ...]:
    """Return the names of the GPUs whose speed is known."""
    return tuple(gpu.name.removeprefix("NVIDIA ") for gpu in _GPUS)


def find_gpu(name: str) -> GpuModel | None:
    """Return the GPU with this name, in full or abbreviated: ``RTX 3090``, ``rtx3090``, ``A100 80GB``.

    Every word of ``name`` must be one of the model's, so that "RTX 3060 Ti" is unknown and not a 3060. Memory that its
    name does not have must be about the model's: ``RTX 3090 24GB``. Of several that match, the slowest is returned.
    """
    words = _words(name)
    if not any(_MODEL_NUMBER.fullmatch(word) for word in words):
        return None
    exact = [gpu for gpu in _GPUS if _words(gpu.name) == words or _joined(gpu.name) == _joined(name)]
    found = exact or [gpu for gpu in _GPUS if words <= _words(gpu.name)] or _with_memory(words)
    return min(found, key=lambda gpu: (gpu.speed.tflops, gpu.speed.gigabytes_s), default=None)


def _with_memory(words: frozenset[str]) -> list[GpuModel]:
    """Return the GPUs with all words but one that says their memory."""
    sizes = {word: int(size[1]) for word in words if (size := _MEMORY.fullmatch(word))}
    bare = words - sizes.keys()
    if len(sizes) != 1 or not any(_MODEL_NUMBER.fullmatch(word) for word in bare):
        return []
    (memory,) = sizes.values()
    return [gpu for gpu in _GPUS if bare <= _words(gpu.name) and abs(gpu.memory_gib - memory) <= _MEMORY_OFF_GIB]


def _words(name: str) -> frozenset[str]:
    joined = re.sub(r"(\d)\s+(?=g(?:i?b)?\b)", r"\1", name.casefold())  # "24 GB"
    return frozenset(re.findall(r"[a-z0-9]+", joined)) - {"nvidia", "geforce"}


def _joined(name: str) -> str:
    """Return the name without spaces and makers: ``rtx3090``."""
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.casefold())


def is_same_size(parameters: int, known: int) -> bool:
    """Whether a model's parameters are those of a published one, up to a vocabulary that was resized and the like."""
    return abs(parameters / known - 1) < _SAME_SIZE


def lm_size(model: str) -> LmSize:
    """Return the size of an LM by name or path; an unknown one counts as the largest."""
    return LM_SIZES.get(model.rstrip("/").rsplit("/", 1)[-1], LM_SIZES[LMS[-1]])


def lm_songs_a_minute(size: LmSize, backend: Backend, in_flight: int, duration_s: float) -> float:
    """Return how many songs of ``duration_s`` seconds an LM plans per minute, ``in_flight`` at once, on an H200.

    Interpolated between the measured points, logarithmic on both axes; more songs than the most that were measured
    count as no faster. Includes the codes only, not the metadata.
    A size that was not measured counts as the next larger one, or as proportionally slower than the largest.
    """
    name, songs = _measured(size), min(in_flight, lm_gains_to(size, backend))
    rate = _between(_VLLM[name], songs) * min(1.0, LM_SIZES[name].parameters / size.parameters)
    if backend == "pt":
        rate *= _between(_PT, songs) / _between(_VLLM[LMS[1]], songs)
    return rate * _LM_RATE_S / duration_s


def lm_gains_to(size: LmSize, backend: Backend) -> int:
    """Return the most concurrent songs that were measured: no more are known to be faster."""
    return _PT[-1][0] if backend == "pt" else _VLLM[_measured(size)][-1][0]


def _measured(size: LmSize) -> str:
    return next((name for name, known in LM_SIZES.items() if size.parameters <= known.parameters), LMS[-1])


def _between(points: tuple[tuple[int, float], ...], x: int) -> float:
    """Interpolate a curve at ``x``, up to its last point."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right:
            return low * math.exp(math.log(high / low) * math.log(x / left) / math.log(right / left))
    raise ValueError(f"not measured: {x}")
