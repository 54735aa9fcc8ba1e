# SPDX-License-Identifier: Apache-2.0
"""Triton kernel that subtracts medians: of all rows or of all columns of matrices, in one pass over memory."""

import triton
import triton.language as tl

CELLS = 8192
"""Numbers that one program holds in its registers: several rows of this many together, or one longer row."""


@triton.jit(do_not_specialize=["rows", "columns"])
def subtract_twice_the_median(values, rows, columns, ROWS: tl.constexpr, LONGEST: tl.constexpr, TOGETHER: tl.constexpr):
    """Replace values by relu(value - 2 · median), in [matrices, rows, columns], none of which is negative.

    The medians are those of the rows (ROWS) or of the columns. Program (i, j) does TOGETHER of them in matrix j.

    The bits of numbers that are not negative, read as whole numbers, are in the numbers' order: the median is found bit
    by bit, as the largest number that no more than half of the others lie below.
    """
    count, many = (columns, rows) if ROWS else (rows, columns)
    lines = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)[:, None]
    places = tl.arange(0, LONGEST)[None, :]
    at = tl.program_id(1) * rows * columns + (lines * columns + places if ROWS else places * columns + lines)
    there = (lines < many) & (places < count)
    # Beyond a line's end there is nothing that its median could be.
    found = tl.load(values + at, there, tl.where(places < count, 0.0, float("inf")))
    bits = found.to(tl.int32, bitcast=True)
    half = (count + 1) // 2
    lower = tl.zeros([TOGETHER], dtype=tl.int32)
    for bit in range(31):
        trial = lower | (1 << (30 - bit))
        below = tl.sum((bits < trial[:, None]).to(tl.int32), axis=1)
        lower = tl.where(below < half, trial, lower)
    # Of an even count, the median is the middle of the two in the middle.
    covered = tl.sum((bits <= lower[:, None]).to(tl.int32), axis=1)
    above = tl.min(tl.where(bits > lower[:, None], bits, 0x7FFFFFFF), axis=1)
    upper = tl.where((count % 2 == 1) | (covered > half), lower, above)
    least, most = lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True)
    median = most - (most - least) * 0.5
    left = found - 2.0 * median[:, None]
    tl.store(values + at, tl.where(left < 0.0, 0.0, left), there)
