# SPDX-License-Identifier: Apache-2.0
"""Classification of torch's and diffusers' errors, and their translation into the project's own."""

import re

import torch

from acestep_consumer.domain.errors import ConsumerError, DiskFull, RenderFailed, ResourceExhausted

# Messages of allocators that do not raise torch's own class: CPU, Metal, cuDNN, cuBLAS.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.@~+-]+){2,}[\\/]?")


def translate(error: Exception) -> ConsumerError:
    """Return the error to publish: its text contains no path and no traceback."""
    if DiskFull.caused(error):  # also behind an encoder's failure
        return DiskFull()
    if isinstance(error, ConsumerError):
        return error
    if is_out_of_memory(error):
        return ResourceExhausted("the device has too little memory for this job; request fewer or shorter songs")
    if isinstance(error, ValueError | TypeError):
        return RenderFailed(f"the pipeline refused the request: {_public(error)}")
    return RenderFailed(f"the renderer failed on this request ({type(error).__name__})")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or in RAM."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def is_fatal(error: BaseException) -> bool:
    """Whether the device has failed for this process: after an illegal access, for example, every later call fails."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _public(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return _PATH.sub("…", first.replace("`", ""))[:300]
