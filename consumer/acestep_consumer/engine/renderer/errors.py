# SPDX-License-Identifier: Apache-2.0
"""Errors of torch and diffusers in the project's own terms. This is the one place where they are told apart."""

import re

import torch

from acestep_consumer.domain.errors import ConsumerError, DiskFull, RenderFailed, ResourceExhausted

# How allocators say it when they do not raise torch's own class: CPU, Metal, cuDNN, cuBLAS.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.@~+-]+){2,}[\\/]?")


def translate(error: Exception) -> ConsumerError:
    """Return the error that a producer may hear of. Its text holds no path and no stack."""
    if DiskFull.lies_behind(error):  # also behind an encoder's failure
        return DiskFull()
    if isinstance(error, ConsumerError):
        return error
    if is_out_of_memory(error):
        return ResourceExhausted("the device has too little memory for this job; ask for fewer or shorter songs")
    if isinstance(error, ValueError | TypeError):
        return RenderFailed(f"the pipeline refused the request: {_public(error)}")
    return RenderFailed(f"the renderer broke on this request ({type(error).__name__})")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the card or in RAM."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: after an illegal access, say, every later call fails as well."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _public(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return _PATH.sub("…", first.replace("`", ""))[:300]
