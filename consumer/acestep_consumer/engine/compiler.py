# SPDX-License-Identifier: Apache-2.0
"""Whether this host can compile what ``torch.compile`` generates, found out with a small program. Without torch.

Slim images and hosts have no compiler. Torch would notice at the first kernel, and the renderer would die of it.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

INSTALL: Final = "apt-get install gcc python3-dev"
INSTALL_CPP: Final = "apt-get install g++ python3-dev"

_PROGRAM: Final = b"#include <Python.h>\nint acestep_check(void) { return PY_MAJOR_VERSION; }\n"
_TIMEOUT_S: Final = 60


def compiler_fault(kind: str) -> str | None:
    """Return why kernels cannot be compiled for a device of this kind (``cuda``, ``cpu``); None: they can."""
    language, variable, names = ("c++", "CXX", ("g++",)) if kind == "cpu" else ("c", "CC", ("gcc", "clang"))
    # As Triton and Inductor look for it.
    named = os.environ.get(variable)
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, names)), None)
    fix = INSTALL_CPP if kind == "cpu" else INSTALL
    if compiler is None:
        missing = f"{variable} = {named} is not there" if named else f"there is no {language.upper()} compiler"
        return f"{missing}; {fix}"
    return _try(compiler, language, fix)


def _try(compiler: str, language: str, fix: str) -> str | None:
    include = f"-I{sysconfig.get_path('include')}"
    with tempfile.TemporaryDirectory(prefix="acestep-compiler-") as folder:
        command = (compiler, "-x", language, include, "-shared", "-fPIC", "-o", str(Path(folder) / "check.so"), "-")
        try:
            done = subprocess.run(command, input=_PROGRAM, capture_output=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603 - the compiler that torch would call
        except subprocess.TimeoutExpired:
            return None  # busy, not broken
        except OSError as error:
            return f"{compiler} cannot be run: {error.strerror}; {fix}"
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
    return f"{compiler} fails ({reason.strip()}); {fix}"
