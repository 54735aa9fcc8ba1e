# SPDX-License-Identifier: Apache-2.0
"""LoRA files: reads the weights that a LoRA adds to each layer, in the formats of several programs.

Known are the names of PEFT (ACE-Step's own trainer uses it), of Lightning, diffusers, ComfyUI and kohya, and LyCORIS'
LoKr (ACE-Step's second trainer); each with DoRA's magnitudes or without. The scale is read from one of three places:
``alpha`` in the file, the file's header, or the ``adapter_config.json`` beside it. Safetensors only: no code is ever
loaded from a file.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open

from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.inputs.loras import PEFT_CONFIG, PEFT_WEIGHTS

# Configuration in a file's header: PEFT's as diffusers puts it there, and LyCORIS' as ACE-Step's trainer does.
_HEADERS: Final = ("lora_adapter_metadata", "lokr_config")
_PREFIXES: Final = (
    "_forward_module.",
    "base_model.model.",
    "transformer.",
    "diffusion_model.",
    "decoder.",
    "lora_unet_",
    "lycoris_",
    "decoder_",
)
# Formats in which a LoRA without alpha has scale 1. In PEFT's, alpha is in another file, without which nobody knows it.
_ALPHA_IS_RANK: Final = ("transformer.", "diffusion_model.")
_WEIGHT: Final = re.compile(r"(.+)\.lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight")
_LOKR: Final = re.compile(r"(.+)\.lokr_(w[12](?:_[ab])?)")
_MAGNITUDE: Final = re.compile(r"(.+)\.(?:lora_magnitude_vector(?:\.\w+)*|dora_scale)")
_ALPHA: Final = re.compile(r"(.+)\.alpha")
_SIDES: Final = {"A": "down", "down": "down", "B": "up", "up": "up"}
_RENAMED: Final = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0", "to_out_0": "to_out.0"}
_PROJECTIONS: Final = {"proj_in.1": "proj_in_conv", "proj_in_1": "proj_in_conv"}
# Names in which underscores stand for dots.
_BLOCK: Final = re.compile(r"layers_(\d+)_(self_attn|cross_attn|mlp)_(\w+)")
_TIME: Final = re.compile(r"(time_embed(?:_r)?)_(linear_1|linear_2|time_proj)")
_PLAIN_PATTERN: Final = re.compile(r"\^?([\w.]+)\$?")
_PRECISIONS: Final = frozenset({torch.float16, torch.bfloat16, torch.float32})
_MAX_FACTOR: Final = 1e6
"""Real ones are below 100. Float32 overflows at 3e38, and the layers after this one much earlier."""
_MAX_SHOWN: Final = 100


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A LoRA's change to the weight of one linear layer: ``factor * up @ down``.

    ``layer`` is diffusers' name of it, ``down`` is [rank, inputs], ``up`` [outputs, rank], in the file's precision.
    ``magnitude``: of DoRA, the lengths of the changed weight's rows, [outputs] or [outputs, 1], or of its columns,
    [1, inputs].
    """

    layer: str
    down: torch.Tensor
    up: torch.Tensor
    factor: float
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the layer."""
        return len(self.up), self.down.shape[1]

    def added_to(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """Return a float32 ``weight`` plus ``scale`` times the change, without the magnitude."""
        up, down = (side.to(weight.device).float() for side in (self.up, self.down))
        return torch.addmm(weight, up, down, alpha=self.factor * scale)


@dataclass(frozen=True, slots=True, eq=False)
class KroneckerDelta:
    """A LoKr's change to the weight of one layer: ``factor`` times the Kronecker product of two matrices.

    The layer may be a convolution, whose weight is [outputs, inputs x kernel] here. Otherwise as ``Delta``.
    """

    layer: str
    left: torch.Tensor
    right: torch.Tensor
    factor: float
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the layer."""
        return len(self.left) * len(self.right), self.left.shape[1] * self.right.shape[1]

    def added_to(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """Return a float32 ``weight`` plus ``scale`` times the change, without the magnitude."""
        left, right = (side.to(weight.device) for side in (self.left, self.right))
        return weight + self.factor * scale * torch.kron(left, right)


AnyDelta = Delta | KroneckerDelta


class _Scaling(BaseModel):
    """The scale in PEFT's configuration, and in LyCORIS'."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: Annotated[FiniteFloat | None, Field(validation_alias=AliasChoices("lora_alpha", "linear_alpha"))] = None
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: Annotated[bool, Field(validation_alias=AliasChoices("use_rslora", "rs_lora"))] = False
    use_dora: Annotated[bool, Field(validation_alias=AliasChoices("use_dora", "weight_decompose"))] = False

    def alpha_of(self, layer: str) -> float | None:
        """Return the alpha of ``layer``, by its name in the file."""
        found = (alpha for pattern, alpha in self.alpha_pattern.items() if _matches(pattern, layer))
        return next(found, self.lora_alpha)

    def factor(self, alpha: float, rank: int) -> float:
        """Return the factor that an alpha means."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(slots=True)
class _Parts:
    """The tensors of one layer that have been found so far, by their role.

    ``alpha_is_rank``: in this format, no alpha means a factor of 1.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None
    alpha_is_rank: bool = False

    def put(self, role: str, key: str, tensor: torch.Tensor) -> None:
        if role in self.tensors:
            raise InputUnreadable(f"the LoRA holds {_shown(key)} under two names")
        self.tensors[role] = tensor


def read_lora(path: Path, alpha: float | None = None) -> tuple[AnyDelta, ...]:
    """Read every layer of a LoRA into RAM. ``alpha``: for a file that does not say it.

    Raises:
        InputUnreadable: it is not a safetensors file, it is damaged, it holds no LoRA, or nobody knows its alpha.
    """
    tensors, header = _load(path)
    scaling = _scaling_of(path, header)
    layers = _sort(tensors)
    if not layers:
        raise InputUnreadable("the LoRA is empty: the file holds no weights")
    if len({_diffusers_name(layer) for layer in layers}) < len(layers):
        raise InputUnreadable("the LoRA names one layer in two ways")
    return tuple(_delta(layer, parts, scaling, alpha) for layer, parts in layers.items())


def _load(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dict
    except FileNotFoundError as error:
        raise InputUnreadable("the LoRA's file is gone") from error
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:  # also unknown dtypes
        raise InputUnreadable("the LoRA is not a safetensors file, or it is damaged") from error


def _scaling_of(path: Path, header: Mapping[str, str]) -> _Scaling:
    """Return the scaling. ``adapter_config.json`` is read beside PEFT's own file name only: it could be another's."""
    beside = path.with_name(PEFT_CONFIG)
    try:
        if path.name == PEFT_WEIGHTS and beside.is_file():
            return _Scaling.model_validate_json(beside.read_bytes())
        written = json.loads(next((header[name] for name in _HEADERS if name in header), "{}"))
        return _Scaling.model_validate({_bare(name): value for name, value in written.items()})
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputUnreadable(f"the LoRA's configuration cannot be used: {_shown(field)} {_rule(field)}") from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputUnreadable("the LoRA's configuration cannot be read") from error


def _rule(field: str) -> str:
    """Return the error text of a field of the configuration."""
    return {"peft_type": "is not LORA; other adapters are not supported"}.get(field, "is malformed")


def _sort(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Parts]:
    """Group the tensors by layer, under the layer's name in the file."""
    layers: dict[str, _Parts] = {}

    def parts_of(layer: str) -> _Parts:
        return layers.setdefault(_bare(layer), _Parts())

    for key, tensor in tensors.items():
        if (match := _WEIGHT.fullmatch(key)) is not None:
            parts = parts_of(match[1])
            parts.put(_SIDES[match[2]], key, tensor)
            parts.alpha_is_rank |= match[2] in _SIDES.values() or key.startswith(_ALPHA_IS_RANK)
        elif (match := _LOKR.fullmatch(key)) is not None:
            parts_of(match[1]).put(match[2], key, tensor)
        elif (match := _MAGNITUDE.fullmatch(key)) is not None:
            parts_of(match[1]).put("magnitude", key, tensor)
        elif (match := _ALPHA.fullmatch(key)) is not None and tensor.numel() == 1:
            if tensor.is_complex():
                raise InputUnreadable(f"the LoRA's {_shown(key)} is a complex number: alpha must be a real one")
            parts_of(match[1]).alpha = float(tensor)
        else:
            raise InputUnreadable(f"the LoRA holds {_shown(key)}, which is not part of a LoRA{_kind(key)}")
    return layers


def _kind(key: str) -> str:
    """Return a note on other kinds of adapters, which are recognised by their keys."""
    kinds = {"lokr_": "LoKr with Tucker decomposition", "hada_": "LoHa"}
    return next((f": {kind} is not supported" for mark, kind in kinds.items() if mark in key), "")


def _delta(layer: str, parts: _Parts, scaling: _Scaling, given_alpha: float | None) -> AnyDelta:
    _check_numbers(layer, parts.tensors.values())
    magnitude = parts.tensors.get("magnitude")
    if scaling.use_dora and magnitude is None:
        raise InputUnreadable(f"the LoRA is a DoRA without the magnitude of {_shown(layer)}")
    name = _diffusers_name(layer)
    if any(role.startswith("w") for role in parts.tensors):
        left, right, rank = _kronecker_sides(layer, parts.tensors)
        factor = 1.0 if rank is None else _factor(layer, parts, scaling, given_alpha, rank)
        return KroneckerDelta(name, left, right, factor, magnitude)
    down, up = parts.tensors.get("down"), parts.tensors.get("up")
    if down is None or up is None:
        raise InputUnreadable(f"the LoRA has only one of the two matrices of {_shown(layer)}")
    _check_product(layer, up, down)
    return Delta(name, down, up, _factor(layer, parts, scaling, given_alpha, len(down)), magnitude)


def _kronecker_sides(layer: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Return both matrices in float32, and the rank of the one that is a product; None: neither is."""
    sides, rank = [], None
    for name in ("w1", "w2"):
        if name in tensors:
            side = tensors[name].float()
        elif (up := tensors.get(f"{name}_a")) is not None and (down := tensors.get(f"{name}_b")) is not None:
            _check_product(layer, up, down)
            side, rank = up.float() @ down.float(), len(down)
        else:
            raise InputUnreadable(f"the LoKr has only one of the two matrices of {_shown(layer)}")
        if side.ndim != 2:  # noqa: PLR2004 - a matrix
            raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} do not fit each other")
        sides.append(side)
    return sides[0], sides[1], rank


def _check_product(layer: str, up: torch.Tensor, down: torch.Tensor) -> None:
    if not (down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] > 0):  # noqa: PLR2004 - a matrix
        raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} do not fit each other")


def _check_numbers(layer: str, tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype not in _PRECISIONS:
            raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} are neither 16-bit nor 32-bit numbers")
        if not tensor.isfinite().all():
            raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} are not all finite numbers")


def _factor(layer: str, parts: _Parts, scaling: _Scaling, given_alpha: float | None, rank: int) -> float:
    """Return the layer's factor: from the file, its configuration, the request, or the format's rule, in this order."""
    configured = scaling.alpha_of(layer)
    if parts.alpha is not None:
        factor = parts.alpha / rank
    elif (alpha := given_alpha if configured is None else configured) is not None:
        factor = scaling.factor(alpha, rank)
    elif parts.alpha_is_rank:
        return 1.0
    else:
        raise InputUnreadable(
            f"the LoRA's strength is unknown: its alpha is neither in the file nor in an {PEFT_CONFIG} beside "
            f"{PEFT_WEIGHTS}; put both there, or name lora.alpha in the request"
        )
    if not math.isfinite(factor):
        raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} are not all finite numbers")
    if abs(factor) > _MAX_FACTOR:
        raise InputUnreadable(f"the LoRA's alpha for {_shown(layer)} is too large: {factor:g} times its rank of {rank}")
    return factor


def _bare(name: str) -> str:
    """Return the name without the prefixes for the model itself, which differ between programs."""
    while (shorter := next((name.removeprefix(each) for each in _PREFIXES if name.startswith(each)), name)) != name:
        name = shorter
    return name


def _diffusers_name(layer: str) -> str:
    """Return diffusers' name of a layer, from ACE-Step's own or with underscores for dots."""
    for flat in (_BLOCK, _TIME):
        if (match := flat.fullmatch(layer)) is not None:
            layer = ".".join(("layers", *match.groups()) if flat is _BLOCK else match.groups())
    head, dot, last = layer.rpartition(".")
    return _PROJECTIONS.get(layer, head + dot + _RENAMED.get(last, last))


def _matches(pattern: str, layer: str) -> bool:
    """Whether PEFT's pattern matches ``layer``: its name, or the end of it. Regular expressions are refused."""
    plain = _PLAIN_PATTERN.fullmatch(pattern)
    if plain is None:
        raise InputUnreadable(f"the LoRA's alpha_pattern {_shown(pattern)} is a regular expression: not supported")
    return layer == plain[1] or layer.endswith(f".{plain[1]}")


def _shown(text: str) -> str:
    """Return text from a file, safe to print."""
    return ascii(text[:_MAX_SHOWN])
