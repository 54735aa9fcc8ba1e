# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker with a key-value cache sized by what this process allocates, whatever other processes do meanwhile.

vLLM measures the memory of the whole device before and after a trial pass, so that nothing else may allocate at that
time, and records CUDA graphs twice to know their size. Here torch's own counter of this process is read, and there is
an allowance for what it does not count. It is meant for large cards, where the allowance costs next to nothing.
"""

import gc
from typing import Any, Final

import torch
from vllm.v1.worker.gpu_worker import Worker

from acestep_consumer.policy.lm_memory import cache_bytes

_ANY_SIZE: Final = 1 << 30


class OwnMemoryWorker(Worker):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Used by vLLM in place of its own worker."""

    def determine_available_memory(self) -> int:
        """Return the bytes for the key-value cache: of the requested share, what the trial pass leaves."""
        this: Any = self
        torch.cuda.reset_peak_memory_stats(this.device)
        # With a size that is given, each version of vLLM makes its trial pass and measures nothing. This one is only so
        # that it does; it is always the same, since the name of vLLM's folder of compiled kernels depends on it.
        this.cache_config.kv_cache_memory_bytes = _ANY_SIZE
        super().determine_available_memory()
        this.cache_config.kv_cache_memory_bytes = None
        torch.cuda.synchronize(this.device)
        peak = torch.cuda.max_memory_allocated(this.device)
        gc.collect()
        torch.cuda.empty_cache()
        this.available_kv_cache_memory_bytes = cache_bytes(int(this.requested_memory), peak)
        return int(this.available_kv_cache_memory_bytes)
