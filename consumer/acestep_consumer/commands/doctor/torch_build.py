# SPDX-License-Identifier: Apache-2.0
"""What torch's files tell of it: whether this build could see a GPU here. Importing it would take seconds."""

import ctypes
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_DRIVER: Final = "libcuda.so.1"


def blind() -> str | None:
    """Return why torch is certain to see no GPU here; None: it has to be asked."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    return blind_build(Path(found.origin).parent, sys.platform, _DRIVER)


def blind_build(package: Path, platform: str, driver: str) -> str | None:
    """Judge the build in this folder.

    Args:
        package: torch's folder. Its ``version.py`` names what it was built for; it imports nothing of torch.
        platform: as ``sys.platform`` says.
        driver: the library that CUDA needs at run time.
    """
    if platform == "darwin":
        return None  # Metal is in every build
    try:
        build: dict[str, Any] = runpy.run_path(str(package / "version.py"))
        named = build["cuda"], build.get("hip"), build.get("xpu")
    except Exception:  # noqa: BLE001 - it is a program; whatever it does, torch itself can be asked
        return None
    cuda, *others = named
    if any(others):
        return None
    if not cuda:
        return f"torch {build.get('__version__')} is a build for the CPU alone"
    return None if platform != "linux" or _loads(driver) else f"there is no NVIDIA driver ({driver})"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
