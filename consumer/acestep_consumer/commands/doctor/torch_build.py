# SPDX-License-Identifier: Apache-2.0
"""Reads from torch's files whether this build could see a GPU here; importing torch would take seconds."""

import ctypes
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_DRIVER: Final = "libcuda.so.1"


def no_gpu_reason() -> str | None:
    """Return why torch certainly sees no GPU here; None: it has to be asked."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    return no_gpu_reason_of(Path(found.origin).parent, sys.platform, _DRIVER)


def no_gpu_reason_of(package: Path, platform: str, driver: str) -> str | None:
    """Return why the build in this folder certainly sees no GPU; None: it has to be asked.

    Args:
        package: torch's folder. Its ``version.py`` says what it was built for, without importing torch.
        platform: ``sys.platform``.
        driver: the library of the CUDA driver.
    """
    if platform == "darwin":
        return None  # Metal is in every build
    try:
        build: dict[str, Any] = runpy.run_path(str(package / "version.py"))
        targets = build["cuda"], build.get("hip"), build.get("xpu")
    except Exception:  # noqa: BLE001 - it may fail in any way; torch itself can still be asked
        return None
    cuda, *others = targets
    if any(others):
        return None
    if not cuda:
        return f"torch {build.get('__version__')} is a CPU-only build"
    return None if platform != "linux" or _loads(driver) else f"there is no NVIDIA driver ({driver})"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
