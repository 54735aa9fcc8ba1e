# SPDX-License-Identifier: Apache-2.0
"""The decoder of a VAE (diffusers' OobleckDecoder) in Triton kernels, from ``decoder_kernels``.

Measured on an H200 for 300 s of audio, hot: 84 ms, where convolutions and activations compiled by torch take 137. It
is twice as near to float32, since sums are rounded to bfloat16 less often, and compiled in 7 s in place of 37.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import nn
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from acestep_consumer.engine.renderer.decoder.decoder_kernels import convolve, sum_taps

# Channels up to which a residual unit is one kernel. With 256 its tiles have too few rows: two kernels are faster.
_UNIT_CHANNELS = 128
_LEAST_CHANNELS = 16  # of a matrix product on tensor cores
_GROUP = 8  # rows of tiles that are computed together
_DEEP = 2048  # sums so long that tiles of 256 columns pay
_COMPILING_THREADS = 8


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes of a kernel.

    A program computes ``rows`` × ``columns``, sums ``depth`` at a time and loads ``stages`` of them ahead, by ``warps``
    of at most ``registers`` each. ``tma``: with Hopper's copy engine.
    """

    rows: int = 64
    columns: int = 64
    depth: int = 32
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    tma: bool = False


@dataclass(frozen=True, slots=True)
class _Snake:
    """x + amplitude · sin²(alpha · x), float32 for each channel."""

    alpha: torch.Tensor
    amplitude: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Taps:
    """The source rows that a row of the result is made of: ``count`` of them, ``step`` apart, the first at ``first``.

    ``stride`` above 1: a transposed convolution, with its ``padding``.
    """

    count: int = 1
    first: int = 0
    step: int = 1
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True, slots=True)
class _Pointwise:
    """Layers between a dilated convolution and the end of its residual unit: bias, snake, 1×1 convolution."""

    bias: torch.Tensor
    snake: _Snake
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Ending:
    """Last steps on the result of a kernel.

    ``adds``: the residual is added. ``keeps``: it is the residual of what follows. ``snake``: what comes next.
    ``projection``, [columns, outputs]: what comes next is this matrix.
    """

    snake: _Snake
    adds: bool = False
    keeps: bool = False
    projection: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Memory:
    """Tensors in which a kernel reads the residual and writes its results; None: it does not."""

    residual: torch.Tensor | None
    raw: torch.Tensor | None
    activated: torch.Tensor | None
    projected: torch.Tensor | None


Choose = Callable[["Convolution"], Tiling]


def on_hopper(convolution: "Convolution") -> Tiling:
    """Return the fastest tiling that was found on an H200."""
    columns = min(128, convolution.outputs)
    tiling = Tiling(128, columns, min(64, convolution.inputs), stages=3, tma=True)
    if convolution.is_unit or convolution.taps.count == 1:
        return replace(tiling, warps=8, registers=128)  # two programs on a multiprocessor: one computes, one writes
    if convolution.taps.count * convolution.inputs > _DEEP and convolution.outputs % 256 == 0:
        return replace(tiling, columns=256, warps=8)
    return tiling


class FusedDecoder(nn.Module):
    """Decodes [windows, latents, channels] to float32 audio, [windows, audio channels, samples].

    Args:
        decoder: an ``OobleckDecoder`` without weight norm; its weights are copied.
        choose: the tiling of each kernel.

    Raises:
        ValueError: it has channels that the kernels are not for; see ``fits``.
    """

    def __init__(self, decoder: Any, choose: Choose = on_hopper) -> None:
        super().__init__()
        if not fits(decoder):
            raise ValueError("the fused decoder is for powers of two of at least 16 channels")
        self._convolutions = nn.ModuleList(_convolutions(decoder))
        self._choose = choose
        self._audio_channels: int = decoder.conv2.out_channels
        self._last_taps: int = decoder.conv2.kernel_size[0]

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode a batch of windows of one length."""
        return self._run(latents.contiguous(), run=True)

    def compile_kernels(self) -> None:
        """Compile every kernel, several at a time, or load it from the cache."""
        first: Any = self._convolutions[0]
        latents = torch.empty(1, 1, first.inputs, dtype=first.weight.dtype, device=first.weight.device)
        with ThreadPoolExecutor(_COMPILING_THREADS) as threads, triton.AsyncCompileMode(threads):
            self._run(latents, run=False)

    def _run(self, activated: torch.Tensor, *, run: bool) -> torch.Tensor:
        raw: torch.Tensor | None = None
        for convolution in self._convolutions:
            tiling = self._choose(convolution)  # type: ignore[arg-type]  # a ModuleList says Module
            activated, raw = convolution(activated, raw, tiling, run=run)
        windows, columns, rows = activated.shape
        audio = activated.new_empty(windows, self._audio_channels, rows)
        grid = (triton.cdiv(rows, 1024), windows, self._audio_channels)
        _launch(sum_taps, grid, activated, audio, rows, self._audio_channels, self._last_taps, columns, 1024, run=run)
        return audio


def fits(decoder: Any) -> bool:
    """Whether the kernels are for a decoder of these widths."""
    convolutions = [each for each in decoder.modules() if isinstance(each, nn.Conv1d | nn.ConvTranspose1d)]
    widths = {each.in_channels for each in convolutions}
    return all(width >= _LEAST_CHANNELS and width & (width - 1) == 0 for width in widths)


class Convolution(nn.Module):
    """One kernel: a convolution and what follows it.

    Args:
        weight: [taps · inputs, stride · outputs], in the precision of the activations.
        bias: of the last convolution in the kernel.
        taps: what it reads.
        ending: what is done with the result.
        pointwise: the second half of a residual unit, where the kernel is a whole one.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        taps: _Taps,
        ending: _Ending,
        pointwise: _Pointwise | None = None,
    ) -> None:
        super().__init__()
        self.taps, self.adds, self.keeps = taps, ending.adds, ending.keeps
        self.inputs, self.outputs = weight.shape[0] // taps.count, weight.shape[1] // taps.stride
        self.is_unit = pointwise is not None
        self.projected = 0 if ending.projection is None else len(ending.projection)
        # What a kernel does not read is the bias: it takes no None.
        hidden = pointwise or _Pointwise(bias, _Snake(bias, bias), bias)
        buffers = {
            "weight": weight,
            "bias": bias,
            "pointwise": hidden.weight,
            "hidden_bias": hidden.bias,
            "hidden_alpha": hidden.snake.alpha,
            "hidden_amplitude": hidden.snake.amplitude,
            "alpha": ending.snake.alpha,
            "amplitude": ending.snake.amplitude,
            "projection": bias if ending.projection is None else ending.projection,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(
        self, source: torch.Tensor, residual: torch.Tensor | None, tiling: Tiling, *, run: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the activated result (or the projected one) and the residual of what follows.

        The residual is overwritten.
        """
        windows, rows, _ = source.shape
        taps = self.taps
        length = rows if taps.stride == 1 else (rows + 1) * taps.stride - 2 * taps.padding
        added = residual if self.adds else None
        kept = residual if self.adds else source.new_empty(windows, length, self.outputs) if self.keeps else None
        if self.projected:
            result = source.new_empty(windows, self.projected, length, dtype=torch.float32)
            memory = _Memory(added, kept if self.keeps else None, None, result)
        else:
            result = source.new_empty(windows, length, self.outputs)
            memory = _Memory(added, kept if self.keeps else None, result, None)
        self._convolve(tiling, source, length, memory, run=run)
        if self.keeps:
            return result, kept
        return result, None if self.adds else residual  # of a unit that is two kernels

    def _convolve(self, tiling: Tiling, source: torch.Tensor, length: int, memory: _Memory, *, run: bool) -> None:
        windows, rows, _ = source.shape
        taps = self.taps
        # A row of the copy engine is a whole stride of rows of the output.
        tma = tiling.tma and length % taps.stride == 0
        left: Any = source
        right: Any = self.weight
        if tma:
            left = TensorDescriptor.from_tensor(source, [1, tiling.rows, tiling.depth])
            right = TensorDescriptor.from_tensor(self.weight, [tiling.depth, tiling.columns])

        def operand(tensor: torch.Tensor | None) -> Any:
            if tensor is None or not tma:
                return self.bias if tensor is None else tensor
            return TensorDescriptor.from_tensor(tensor.view(windows, rows, -1), [1, tiling.rows, tiling.columns])

        options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
        if tiling.registers is not None and source.is_cuda:
            options["maxnreg"] = tiling.registers
        _launch(
            convolve,
            (windows * triton.cdiv(rows, tiling.rows) * (taps.stride * self.outputs // tiling.columns),),
            left,
            right,
            self.bias,
            self.pointwise,
            self.hidden_bias,
            self.hidden_alpha,
            self.hidden_amplitude,
            operand(memory.residual),
            operand(memory.raw),
            self.alpha,
            self.amplitude,
            operand(memory.activated),
            self.projection,
            self.bias if memory.projected is None else memory.projected,
            rows,
            length,
            taps.padding,
            taps.first,
            taps.step,
            CIN=self.inputs,
            COUT=self.outputs,
            STRIDE=taps.stride,
            TAPS=taps.count,
            POINTWISE=self.is_unit,
            RESIDUAL=memory.residual is not None,
            RAW=memory.raw is not None,
            ACTIVATED=memory.activated is not None,
            PROJECTED=self.projected,
            FAST=source.is_cuda and source.dtype == torch.bfloat16,
            TMA=tma,
            BM=tiling.rows,
            BN=tiling.columns,
            BK=tiling.depth,
            GROUP=_GROUP,
            run=run,
            **options,
        )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, run: bool, **options: Any) -> None:
    """Launch a kernel, or only compile it."""
    if run:
        kernel[grid](*arguments, **options)
    else:
        kernel.warmup(*arguments, grid=grid, **options)


def _convolutions(decoder: Any) -> Iterator[Convolution]:
    """Yield the decoder's kernels in order."""
    blocks = list(decoder.block)
    after_blocks = [block.snake1 for block in blocks[1:]] + [decoder.snake1]
    first = decoder.conv1
    yield Convolution(_matrix(first), _bias(first), _taps(first), _Ending(_snake(blocks[0].snake1)))
    for block, after in zip(blocks, after_blocks, strict=True):
        units = [block.res_unit1, block.res_unit2, block.res_unit3]
        yield _upsampling(block.conv_t1, _snake(units[0].snake1))
        for unit, snake in zip(units, [units[1].snake1, units[2].snake1, after], strict=True):
            last = unit is units[-1]
            projection = _projection(decoder.conv2) if last and block is blocks[-1] else None
            yield from _unit(unit, _Ending(_snake(snake), adds=True, keeps=not last, projection=projection))


def _unit(unit: Any, ending: _Ending) -> Iterator[Convolution]:
    """Yield the one or two kernels of a residual unit."""
    dilated, mixing, taps, between = unit.conv1, unit.conv2, _taps(unit.conv1), _snake(unit.snake2)
    if dilated.out_channels <= _UNIT_CHANNELS:
        pointwise = _Pointwise(_bias(dilated), between, _matrix(mixing))
        yield Convolution(_matrix(dilated), _bias(mixing), taps, ending, pointwise)
    else:
        yield Convolution(_matrix(dilated), _bias(dilated), taps, _Ending(between))
        yield Convolution(_matrix(mixing), _bias(mixing), _Taps(), ending)


def _upsampling(conv: nn.ConvTranspose1d, snake: _Snake) -> Convolution:
    """Return a transposed convolution whose kernel is two strides long.

    Output row q · stride + r - padding is source row q times tap r plus source row q - 1 times tap r + stride. As a
    matrix, the taps r of one q are side by side; rotated by the padding, they begin with the row q · stride.
    """
    stride, padding = conv.stride[0], int(conv.padding[0])
    weight = conv.weight.detach()
    inputs, outputs, _ = weight.shape
    taps = weight.reshape(inputs, outputs, 2, stride).permute(2, 0, 3, 1).roll(-padding, dims=2)
    matrix = taps.reshape(2 * inputs, stride * outputs).contiguous()
    return Convolution(matrix, _bias(conv), _Taps(2, 0, -1, stride, padding), _Ending(snake, keeps=True))


def _snake(snake: Any) -> _Snake:
    alpha, beta = snake.alpha.detach().float().flatten(), snake.beta.detach().float().flatten()
    if snake.logscale:
        alpha, beta = alpha.exp(), beta.exp()
    return _Snake(alpha.contiguous(), (beta + 1e-9).reciprocal())


def _matrix(conv: nn.Conv1d) -> torch.Tensor:
    """Return [taps · inputs, outputs]."""
    return conv.weight.detach().permute(2, 1, 0).flatten(0, 1).contiguous()


def _bias(conv: nn.Conv1d | nn.ConvTranspose1d) -> torch.Tensor:
    return conv.weight.new_zeros(conv.out_channels).float() if conv.bias is None else conv.bias.detach().float()


def _taps(conv: nn.Conv1d) -> _Taps:
    return _Taps(conv.kernel_size[0], -int(conv.padding[0]), conv.dilation[0])


def _projection(conv: nn.Conv1d) -> torch.Tensor:
    """Return [taps · audio channels, inputs], with rows of zeros up to a size that the tensor cores take."""
    matrix = conv.weight.detach().permute(2, 0, 1).flatten(0, 1)
    rows = max(_LEAST_CHANNELS, triton.next_power_of_2(len(matrix)))
    return pad(matrix, (0, 0, 0, rows - len(matrix))).contiguous()
