# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the VAE decoder: a convolution with everything up to the next one, in one pass over memory.

All memory is channels-last, [windows, rows, channels]. A convolution is a matrix product whose left side is the input
at one row offset for each tap (implicit GEMM): on the tensor cores, summed in float32. Bias, snake, 1×1 convolution and
residual are applied to the sums before they are written. A snake comes before a convolution that reads its input once
for each tap, and so it is the kernel before that applies it: once for each number.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def _snake(x, alpha, amplitude, FAST: tl.constexpr):
    """Return x + amplitude · sin²(alpha · x).

    The fast sine is off by twice the rounding of its float32 argument, however large that is.
    """
    wave = libdevice.fast_sinf(x * alpha) if FAST else tl.sin(x * alpha)
    return x + amplitude * wave * wave


@triton.jit
def _tile_of(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the tile of a program: GROUP rows of tiles at a time, so that their inputs stay in the cache."""
    group = index // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    within = index % (GROUP * tiles_n)
    return group * GROUP + within % height, within // height


@triton.jit
def _written(target, place, kept, corner, sums, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    if TMA:
        target.store(corner, sums.to(target.dtype).reshape(1, BM, BN))
    else:
        tl.store(target + place, sums.to(target.dtype.element_ty), kept)


@triton.jit(do_not_specialize=["rows_in", "length_out", "pad", "first", "step"])
def convolve(
    source,
    weight,
    bias,
    pointwise,
    hidden_bias,
    hidden_alpha,
    hidden_amplitude,
    residual,
    raw,
    alpha,
    amplitude,
    activated,
    projection,
    projected,
    rows_in,
    length_out,
    pad,
    first,
    step,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    POINTWISE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RAW: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PROJECTED: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile, BM × BN, of one window's result, [rows_in, STRIDE · COUT], and what follows it.

    Row m is the sum over taps of source row ``first + m + tap · step`` times ``weight[tap · CIN :][:CIN]``; rows
    outside the source are zeros. Read as rows of COUT, the result is the output of a convolution (STRIDE = 1) or of a
    transposed one, whose last ``pad`` phases of each STRIDE begin one source row later. Rows
    from ``length_out`` on are not written.

    POINTWISE: a snake and a 1×1 convolution follow; a tile has all channels. RESIDUAL: ``residual`` is added.
    RAW, ACTIVATED: the result is written as it is; after the snake that comes next. PROJECTED: that many columns of
    ``activated · projection`` are written, column by column, in float32.

    TMA: source, weight, residual, raw and activated are descriptors for the copy engine; otherwise pointers.
    """
    COLUMNS: tl.constexpr = STRIDE * COUT
    tiles_m = (rows_in + BM - 1) // BM
    tiles_n: tl.constexpr = COLUMNS // BN
    program = tl.program_id(0)
    window = program // (tiles_m * tiles_n)
    tile_m, tile_n = _tile_of(program % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    phase = tile_n * BN // COUT  # one for the whole tile, since BN divides COUT
    start = first + (phase >= STRIDE - pad).to(tl.int32)
    far = tl.cast(window, tl.int64)
    sums = tl.full((BM, BN), 0.0, tl.float32)
    slices: tl.constexpr = CIN // BK
    for k in tl.range(TAPS * slices):
        offset = start + k // slices * step
        channel = k % slices * BK
        if TMA:
            left = source.load([window, tile_m * BM + offset, channel]).reshape(BM, BK)
            right = weight.load([k * BK, tile_n * BN])
        else:
            place = (rows + offset)[:, None] * CIN + (channel + inner)[None, :]
            inside = ((rows + offset >= 0) & (rows + offset < rows_in))[:, None]
            left = tl.load(source + far * rows_in * CIN + place, inside, other=0.0)
            right = tl.load(weight + (k * BK + inner)[:, None] * COLUMNS + columns[None, :])
        sums = tl.dot(left, right, sums, input_precision="ieee")
    channels = tl.multiple_of(tile_n * BN % COUT, BN) + tl.arange(0, BN)
    if POINTWISE:
        sums += tl.load(hidden_bias + channels)[None, :]
        waves, heights = tl.load(hidden_alpha + channels), tl.load(hidden_amplitude + channels)
        sums = _snake(sums, waves[None, :], heights[None, :], FAST)
        mixing = tl.load(pointwise + channels[:, None] * COUT + channels[None, :])
        sums = tl.dot(sums.to(mixing.dtype), mixing, input_precision="ieee")
    sums += tl.load(bias + channels)[None, :]
    place = far * length_out * COUT + rows[:, None] * COLUMNS + columns[None, :]
    kept = (rows * STRIDE + phase < length_out)[:, None]
    corner = [window, tile_m * BM, tile_n * BN]
    if RESIDUAL:
        if TMA:
            sums += residual.load(corner).reshape(BM, BN).to(tl.float32)
        else:
            sums += tl.load(residual + place, kept, other=0.0).to(tl.float32)
    if RAW:
        _written(raw, place, kept, corner, sums, TMA, BM, BN)
    sums = _snake(sums, tl.load(alpha + channels)[None, :], tl.load(amplitude + channels)[None, :], FAST)
    if ACTIVATED:
        _written(activated, place, kept, corner, sums, TMA, BM, BN)
    if PROJECTED:
        column = tl.arange(0, PROJECTED)
        # [columns, channels]: Triton 3.6 multiplies wrongly by so narrow a matrix of the other order.
        narrow = tl.load(projection + channels[:, None] + column[None, :] * COUT)
        parts = tl.dot(sums.to(narrow.dtype), narrow, input_precision="ieee")
        place = far * PROJECTED * rows_in + column[None, :] * rows_in + rows[:, None]
        tl.store(projected + place, parts, (rows < rows_in)[:, None])


@triton.jit(do_not_specialize=["rows"])
def sum_taps(
    projected, audio, rows, CHANNELS: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Finish a convolution of few channels: audio[c, t] is the sum over taps of projected[tap, c, t + tap - middle]."""
    window, channel = tl.program_id(1).to(tl.int64), tl.program_id(2)
    times = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for tap in tl.static_range(TAPS):
        where = times + tap - TAPS // 2
        place = (window * COLUMNS + tap * CHANNELS + channel) * rows + where
        sums += tl.load(projected + place, (where >= 0) & (where < rows), other=0.0)
    tl.store(audio + (window * CHANNELS + channel) * rows + times, sums, times < rows)
