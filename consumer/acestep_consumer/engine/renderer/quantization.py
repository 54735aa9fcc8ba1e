# SPDX-License-Identifier: Apache-2.0
"""Weight-only int8 quantization, by torchao: half the memory of bfloat16 for the layers of DiT and LM.

Each output channel of a linear layer has a scale; products are computed in the precision of the activations. Only the
layers of the transformer are quantized, 96% of a DiT's parameters: embeddings, heads and convolutions stay as they are.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from acestep_consumer.config.settings import Quantization
from acestep_consumer.engine.torchao_checkpoints import INSTALL


class QuantizationUnavailable(Exception):
    """Weights cannot be quantized here; the message says what to install."""


def quantize(model: nn.Module, method: Quantization | None, device: torch.device | str | None = None) -> None:
    """Quantize the transformer layers of a model in place, one after the other; None: leave them.

    Those that were quantized when they were published stay as they are. Either kind is computed by matrix products.

    ``device``: each layer is moved there before it is quantized, so that no more than one is there at full size, and
    the rest of the model follows. None: where they are.

    Raises:
        QuantizationUnavailable: torchao is missing, or another version than this needs.
    """
    if method is None and not any(map(is_quantized, model.parameters())):
        return
    if method is not None:
        with _torchao_wanted():
            from torchao.quantization import quantize_  # noqa: PLC0415 - optional, and takes seconds
        quantize_(model, _config(), filter_fn=_is_in_a_layer, device=device)
    for module in model.modules():
        if type(module) is nn.Linear and is_scaled_int8(module.weight):
            module.__class__ = _Int8Linear


def config_json() -> str:
    """Return torchao's configuration as JSON, as vLLM takes it. Raises ``QuantizationUnavailable``."""
    with _torchao_wanted():
        from torchao.core.config import config_to_dict  # noqa: PLC0415 - as above
    return json.dumps(config_to_dict(_config()))


def is_scaled_int8(weight: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's in int8 that ``scaled_product`` takes: with one scale, or one an output.

    Those whose activations are quantized, too, or that have several scales an output, are left to torchao.

    Raises:
        QuantizationUnavailable: torchao is missing, or another version than this needs.
    """
    if not is_quantized(weight):
        return False
    with _torchao_wanted():
        from torchao.quantization import Int8Tensor  # noqa: PLC0415 - as above

        return (
            isinstance(weight, Int8Tensor)
            and weight.act_quant_kwargs is None
            and weight.act_pre_scale is None
            and weight.scale.numel() <= weight.shape[0]
        )


def scaled_product(
    activations: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``linear(activations, weight, bias)`` for a weight in int8 with one scale, or one for each output.

    A matrix product in the activations' precision, compiled or not. torch's compiler recognizes torchao's own
    expression and replaces it by ``aten._weight_int8pack_mm``, whose CUDA kernel has a thread for each output and no
    tensor cores: a step of the 2B DiT then takes seconds on an H200. Scales in float32 are not what it looks for, and
    round once less.
    """
    product = nn.functional.linear(activations, qdata.to(activations.dtype))
    # In float32 without a copy of the product in float32, which is as large as the activations of a pack.
    scaled: torch.Tensor = product * scale.flatten().float()
    return (scaled if bias is None else scaled + bias).to(activations.dtype)


class _Int8Linear(nn.Linear):
    """A linear layer whose weight is, or was, ``is_scaled_int8``.

    It is no operation of torchao's tensor. The compiler does not look into one until it has compared the graph with
    those in its cache: it would take a product that another version has compiled for the same.
    """

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if not hasattr(weight, "qdata"):  # a LoRA has replaced it; the compiler cannot answer ``is_quantized``
            return super().forward(activations)
        return scaled_product(activations, weight.qdata, weight.scale, self.bias)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a float32 tensor, whether it is quantized or not, for activations as they come."""
    if not is_quantized(weight):
        return weight.float()
    plain: torch.Tensor = weight.dequantize(torch.float32)  # type: ignore[call-arg]  # torchao's, which takes a precision
    # What AWQ and SmoothQuant multiply the activations by before the product.
    factors: torch.Tensor | None = getattr(weight, "act_pre_scale", None)
    return plain if factors is None else plain * factors.float()


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's tensors."""
    return bool(is_traceable_wrapper_subclass(weight))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a model's parameters take; those of a quantized one include its scales."""
    return sum(sum(part.nbytes for part in parts_of(weight)) for weight in model.parameters())


def move(model: nn.Module, device: torch.device | str) -> None:
    """Move a model to a device, quantized or not.

    ``Module.to`` exchanges the insides of a quantized weight, which torch refuses once a compiled model refers to it.
    """
    if any(map(is_quantized, model.parameters())):
        replace_tensors(model, lambda tensor: tensor.to(device))
    else:
        model.to(device)


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Return all parameters and buffers of a model, in the order of ``replace_tensors``."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    replace_tensors(model, keep)
    return found


def replace_tensors(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace all tensors of a model by changed ones; quantized weights become other parameters."""
    for module in model.modules():
        weights, buffers = module._parameters, module._buffers  # noqa: SLF001 - as torch's own Module.to
        for name, weight in list(weights.items()):
            if weight is not None and is_quantized(weight):
                weights[name] = nn.Parameter(change(weight), requires_grad=False)
            elif weight is not None:
                weight.data = change(weight.data)
        for name, buffer in list(buffers.items()):
            buffers[name] = None if buffer is None else change(buffer)


def copied_parts(weight: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a weight whose memory is a copy; of a quantized one each part is copied."""
    if not is_quantized(weight):
        return copy(weight)
    names, context = weight.__tensor_flatten__()
    parts = {name: copy(getattr(weight, name)) for name in names}
    made: torch.Tensor = type(weight).__tensor_unflatten__(parts, context, weight.size(), weight.stride())
    return made


def parts_of(weight: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a weight consists of: itself, or those of a quantized one."""
    if not is_quantized(weight):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    yield from (getattr(weight, name) for name in names)


def _config() -> Any:
    with _torchao_wanted():
        from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - as above

        # Its settings of the compiler are for all that this process compiles, and make that take minutes.
        return Int8WeightOnlyConfig(set_inductor_config=False)


def _is_in_a_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "layers" in name.split(".") and not is_quantized(module.weight)


@contextmanager
def _torchao_wanted() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        name = ((error.name if isinstance(error, ImportError) else None) or "torchao").partition(".")[0]
        raise QuantizationUnavailable(
            f"weights in int8 need {name}, which is missing, or of a version that does not fit: {INSTALL}"
        ) from error
