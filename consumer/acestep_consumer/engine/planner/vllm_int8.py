# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers in int8, of plain tensors. Imports vLLM, which wants ``vllm_engine.prepare`` first."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization import torchao
from vllm.model_executor.layers.quantization.torchao import TorchAOLinearMethod

from acestep_consumer.engine.renderer.quantization import is_scaled_int8, scaled_product


def use_plain_tensors() -> None:
    """Let vLLM take apart the weights in int8 that torchao makes or has made, once they are loaded.

    vLLM cannot save a compiled model whose inputs are torchao's tensors, and traces it anew at each start. And what is
    done with such tensors is in none of the keys of its cache.
    """
    torchao.TorchAOLinearMethod = _PlainTensors


class _PlainTensors(TorchAOLinearMethod):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """torchao's method, but a layer keeps the codes in ``weight`` and their scales, one an output, in ``scale``.

    Layers whose activations are quantized, too, or that have several scales an output, stay torchao's.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        weight: Any = layer.weight
        if is_scaled_int8(weight):
            # However a checkpoint has them: vLLM does not ask whether a model that it has saved was made for these.
            scale = weight.scale.detach().flatten().float().expand(len(weight)).contiguous()
            layer.register_parameter("weight", nn.Parameter(weight.qdata, requires_grad=False))
            layer.register_parameter("scale", nn.Parameter(scale, requires_grad=False))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        scale: Any = getattr(layer, "scale", None)
        if scale is None:
            product: torch.Tensor = super().apply(layer, x, bias)
            return product
        return scaled_product(x, layer.weight, scale, bias)  # type: ignore[arg-type]  # one of a layer's parameters
