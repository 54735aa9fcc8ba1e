# SPDX-License-Identifier: Apache-2.0
"""Medians of the rows and columns of matrices, subtracted: by a kernel of the project's own, or by torch.

Torch finds a median by ``kthvalue``, one thread block a row, with 16 passes over it. The kernel reads a row once.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from threading import Thread
from types import ModuleType
from typing import Any, Final

import structlog
import torch

ROWS: Final = -1
COLUMNS: Final = -2

LONGEST_LINES: Final = ((ROWS, (1024, 2048, 4096, 8192)), (COLUMNS, (1024, 2048)))
"""What kernels are compiled for: the powers of two up to a song's longest lines, 7,500 frames and 2,048 tokens."""

log = structlog.get_logger()


def subtract_medians(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Replace values by relu(value - 2 · median), in place, and return them.

    ``values``: contiguous float32 [matrices, rows, columns], none negative. ``dim``: ``ROWS``, each row has a median,
    or ``COLUMNS``. The median of an even count is the middle of the two in the middle.
    """
    kernels = kernels_for(values.device) if values.device.type == "cuda" else None
    if kernels is None:
        return subtract_medians_by_torch(values, dim)
    return run_kernel(kernels, values, dim)


def subtract_medians_by_torch(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Do what ``subtract_medians`` does on any device."""
    medians = _medians(values) if dim == ROWS else _medians(values.mT.contiguous()).mT
    return values.sub_(medians.mul_(2.0)).relu_()


def _medians(values: torch.Tensor) -> torch.Tensor:
    """Return the medians along the last dimension, kept."""
    half = (values.shape[-1] + 1) // 2
    lower = values.kthvalue(half, dim=-1, keepdim=True).values
    if values.shape[-1] % 2:
        return lower
    # The next one is the same number once more, or the least above it: that is cheaper than to look for it.
    covered = (values <= lower).sum(dim=-1, keepdim=True)
    above = values.masked_fill(values <= lower, torch.inf).amin(dim=-1, keepdim=True)
    return torch.lerp(lower, torch.where(covered > half, lower, above), 0.5)


def run_kernel(kernels: ModuleType, values: torch.Tensor, dim: int) -> torch.Tensor:
    """Do what ``subtract_medians`` does with the kernel of ``median_kernels``."""
    matrices, rows, columns = values.shape
    count, many = (columns, rows) if dim == ROWS else (rows, columns)
    options = _options(kernels, dim, longest_line(count))
    kernels.subtract_twice_the_median[-(-many // options["TOGETHER"]), matrices](values, rows, columns, **options)
    return values


def longest_line(count: int) -> int:
    """Return the length that lines of ``count`` numbers are padded to; there is a kernel for each."""
    return max(1024, 1 << (count - 1).bit_length())


def _options(kernels: ModuleType, dim: int, longest: int) -> dict[str, Any]:
    together = max(1, kernels.CELLS // longest)
    return {"ROWS": dim == ROWS, "LONGEST": longest, "TOGETHER": together, "num_warps": 8}


@contextlib.contextmanager
def kernels_ready_after(device: torch.device) -> Iterator[None]:
    """Compile the kernels in a thread of their own while the body runs, and compare them with torch after it.

    On CUDA devices alone. In the thread nothing runs on the device, where the body may record CUDA graphs.
    """
    if device.type != "cuda":
        yield
        return
    compiling = Thread(target=_compile, args=(device,), name="median kernels", daemon=True)
    compiling.start()
    try:
        yield
    finally:
        compiling.join()
    kernels_for(device)


def _compile(device: torch.device) -> None:
    # Whatever fails here fails in ``kernels_for``, too, which says so.
    with contextlib.suppress(Exception), torch.cuda.device(device):
        from acestep_consumer.engine.renderer.lyrics import median_kernels  # noqa: PLC0415 - not every platform has Triton

        for dim, lengths in LONGEST_LINES:
            for longest in lengths:
                median_kernels.subtract_twice_the_median.warmup(
                    torch.float32, 1, 1, grid=(1, 1), **_options(median_kernels, dim, longest)
                )


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """Return ``median_kernels`` if they do on this device what torch does; None, with a warning in the log, if not."""
    try:
        from acestep_consumer.engine.renderer.lyrics import median_kernels  # noqa: PLC0415 - not every platform has Triton

        for shape in ((2, 37, 1500), (1, 40, 41)):
            values = torch.rand(shape, device=device)
            for dim in (ROWS, COLUMNS):
                wanted = subtract_medians_by_torch(values.clone(), dim)
                if not torch.equal(run_kernel(median_kernels, values.clone(), dim), wanted):
                    log.warning("lyrics are aligned without the median kernel, which is slower: it differs from torch")
                    return None
    except Exception as error:
        # A compiler, a driver: whatever it is, torch can do without.
        log.warning("lyrics are aligned without the median kernel, which is slower: it fails", exc_info=error)
        return None
    return median_kernels
