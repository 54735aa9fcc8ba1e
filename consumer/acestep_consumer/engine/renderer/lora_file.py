# SPDX-License-Identifier: Apache-2.0
"""LoRA files: reads the weights that a LoRA adds to each layer, in the formats of several programs.

Known are the names of PEFT (ACE-Step's own trainer uses it), of diffusers, and of trainers that write ``lora_down`` and
``lora_up``. The scale is read from one of three places: ``alpha`` in the file, the file's header, or the
``adapter_config.json`` beside it. Safetensors only: no code is ever loaded from a file.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open

from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.inputs.loras import PEFT_CONFIG, PEFT_WEIGHTS

_HEADER: Final = "lora_adapter_metadata"  # diffusers puts PEFT's configuration there
_PREFIXES: Final = ("base_model.model.", "transformer.", "diffusion_model.", "decoder.")
_WEIGHT: Final = re.compile(r"(.+)\.lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight")
_ALPHA: Final = re.compile(r"(.+)\.alpha")
_DOWN: Final = frozenset({"A", "down"})
_RENAMED: Final = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
_PLAIN_PATTERN: Final = re.compile(r"\^?([\w.]+)\$?")
_PRECISIONS: Final = frozenset({torch.float16, torch.bfloat16, torch.float32})
_MAX_FACTOR: Final = 1e6
"""Real ones are below 100. Float32 overflows at 3e38, and the layers after this one much earlier."""
_MAX_SHOWN: Final = 100


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A LoRA's change to the weight of one linear layer: ``factor * up @ down``.

    ``layer`` is diffusers' name of it, ``down`` is [rank, inputs], ``up`` [outputs, rank], in the file's precision.
    """

    layer: str
    down: torch.Tensor
    up: torch.Tensor
    factor: float


class _Scaling(BaseModel):
    """The scale in PEFT's configuration."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: Literal["LORA"] = "LORA"
    lora_alpha: FiniteFloat | None = None
    alpha_pattern: dict[str, FiniteFloat] = {}
    use_rslora: bool = False
    use_dora: Literal[False] = False

    def factor(self, layer: str, rank: int) -> float:
        """Return the factor of ``layer``, by its name in the file; 1 where none is given."""
        found = (alpha for pattern, alpha in self.alpha_pattern.items() if _matches(pattern, layer))
        alpha = next(found, self.lora_alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(slots=True)
class _Parts:
    """The tensors of one layer that have been found so far."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None


def read_lora(path: Path) -> tuple[Delta, ...]:
    """Read every layer of a LoRA into RAM.

    Raises:
        InputUnreadable: it is not a safetensors file, it is damaged, or it holds no LoRA.
    """
    tensors, header = _load(path)
    scaling = _scaling_of(path, header)
    layers = _sort(tensors)
    if not layers:
        raise InputUnreadable("the LoRA is empty: the file holds no weights")
    deltas = tuple(_delta(layer, parts, scaling) for layer, parts in layers.items())
    if len({delta.layer for delta in deltas}) < len(deltas):
        raise InputUnreadable("the LoRA names one layer in two ways")
    return deltas


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
        written = json.loads(header.get(_HEADER, "{}"))
        return _Scaling.model_validate({_bare(name): value for name, value in written.items()})
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputUnreadable(f"the LoRA's configuration cannot be used: {_shown(field)} {_rule(field)}") from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputUnreadable("the LoRA's configuration cannot be read") from error


def _rule(field: str) -> str:
    """Return the error text of a field of the configuration."""
    return {
        "peft_type": "is not LORA; other adapters are not supported",
        "use_dora": "is on; DoRA is not supported",
    }.get(field, "is malformed")


def _sort(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Parts]:
    """Group the tensors by layer, under the layer's name in the file."""
    layers: dict[str, _Parts] = {}
    for key, tensor in tensors.items():
        if (match := _WEIGHT.fullmatch(key)) is not None:
            parts = layers.setdefault(_bare(match[1]), _Parts())
            side = "down" if match[2] in _DOWN else "up"
            if getattr(parts, side) is not None:
                raise InputUnreadable(f"the LoRA holds {_shown(key)} under two names")
            setattr(parts, side, tensor)
        elif (match := _ALPHA.fullmatch(key)) is not None and tensor.numel() == 1:
            if tensor.is_complex():
                raise InputUnreadable(f"the LoRA's {_shown(key)} is a complex number: alpha must be a real one")
            layers.setdefault(_bare(match[1]), _Parts()).alpha = float(tensor)
        else:
            raise InputUnreadable(f"the LoRA holds {_shown(key)}, which is not part of a LoRA{_kind(key)}")
    return layers


def _kind(key: str) -> str:
    """Return a note on other kinds of adapters, which are recognised by their keys."""
    kinds = {"lokr_": "LoKr", "hada_": "LoHa", "magnitude": "DoRA", "dora_scale": "DoRA"}
    return next((f": {kind} is not supported" for mark, kind in kinds.items() if mark in key), "")


def _delta(layer: str, parts: _Parts, scaling: _Scaling) -> Delta:
    down, up = parts.down, parts.up
    if down is None or up is None:
        raise InputUnreadable(f"the LoRA has only one of the two matrices of {_shown(layer)}")
    if not (down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] > 0):  # noqa: PLR2004 - a matrix
        raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} do not fit each other")
    if not {down.dtype, up.dtype} <= _PRECISIONS:
        raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} are neither 16-bit nor 32-bit numbers")
    rank = down.shape[0]
    factor = scaling.factor(layer, rank) if parts.alpha is None else parts.alpha / rank
    if not (math.isfinite(factor) and down.isfinite().all() and up.isfinite().all()):
        raise InputUnreadable(f"the LoRA's weights for {_shown(layer)} are not all finite numbers")
    if abs(factor) > _MAX_FACTOR:
        raise InputUnreadable(f"the LoRA's alpha for {_shown(layer)} is too large: {factor:g} times its rank of {rank}")
    return Delta(_diffusers_name(layer), down, up, factor)


def _bare(name: str) -> str:
    """Return the name without the prefixes for the model itself, which differ between programs."""
    while (shorter := next((name.removeprefix(each) for each in _PREFIXES if name.startswith(each)), name)) != name:
        name = shorter
    return name


def _diffusers_name(layer: str) -> str:
    head, dot, last = layer.rpartition(".")
    return head + dot + _RENAMED.get(last, last)


def _matches(pattern: str, layer: str) -> bool:
    """Whether PEFT's pattern matches ``layer``: its name, or the end of it. Regular expressions are refused."""
    plain = _PLAIN_PATTERN.fullmatch(pattern)
    if plain is None:
        raise InputUnreadable(f"the LoRA's alpha_pattern {_shown(pattern)} is a regular expression: not supported")
    return layer == plain[1] or layer.endswith(f".{plain[1]}")


def _shown(text: str) -> str:
    """Return text from a file, safe to print."""
    return ascii(text[:_MAX_SHOWN])
