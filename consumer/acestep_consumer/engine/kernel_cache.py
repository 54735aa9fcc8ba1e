# SPDX-License-Identifier: Apache-2.0
"""Folder of compiled kernels, which the next start of either engine process reads. Without torch."""

import os
from pathlib import Path


def set_kernel_cache(folder: Path | None) -> None:
    """Set where torch, Triton and vLLM keep compiled kernels for the next start. Must precede the import of torch.

    ``folder`` None: in the user's cache folder. What the operator has set in the environment stays.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = folder or cache / "acestep-consumer" / "kernels"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    os.environ.setdefault("TRITON_CACHE_DIR", str(kernels / "triton"))
    os.environ.setdefault("VLLM_CACHE_ROOT", str(kernels / "vllm"))
