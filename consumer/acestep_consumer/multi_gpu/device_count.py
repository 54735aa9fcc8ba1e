# SPDX-License-Identifier: Apache-2.0
"""Counts the GPUs that torch sees: nvidia-smi may list some that torch cannot use.

Torch is imported in a subprocess (``python -m acestep_consumer.multi_gpu.device_count``), not in the caller.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

TIMEOUT_S = 120


class DeviceCountFailed(Exception):
    """Torch could not be asked; the message says why and what to do."""


class DeviceCount(BaseModel):
    """``torch``: its version. ``cuda``, ``hip``: versions it is built for, or None. ``count``: visible GPUs."""

    model_config = ConfigDict(frozen=True)

    torch: str
    cuda: str | None
    hip: str | None
    count: int


def ask_torch(environ: Mapping[str, str]) -> DeviceCount:
    """Ask torch in a subprocess with this environment, so that CUDA_VISIBLE_DEVICES and the like apply.

    Raises:
        DeviceCountFailed: torch is missing, fails, or does not answer within ``TIMEOUT_S`` seconds.
    """
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(  # noqa: S603 - this module
            command, env=dict(environ), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceCountFailed(f"torch did not report its GPUs within {TIMEOUT_S} s; does nvidia-smi hang?") from error
    # The last line: drivers and plug-ins may print while torch is imported.
    answer = done.stdout.strip().rpartition("\n")[2]
    with suppress(ValidationError):
        return DeviceCount.model_validate_json(answer)
    reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    if "No module named 'torch'" in reason:
        raise DeviceCountFailed("torch is missing: pip install 'acestep-consumer[engine]'")
    raise DeviceCountFailed(f"torch cannot report its GPUs: {reason}")


def main() -> None:
    """Print the count as one line of JSON."""
    import torch  # noqa: PLC0415 - only in the subprocess

    found = DeviceCount(
        torch=str(torch.__version__), cuda=torch.version.cuda, hip=torch.version.hip, count=torch.cuda.device_count()
    )
    sys.stdout.write(json.dumps(found.model_dump()) + "\n")


if __name__ == "__main__":
    main()
