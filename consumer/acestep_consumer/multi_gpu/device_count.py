# SPDX-License-Identifier: Apache-2.0
"""Counts the GPUs that torch sees. Torch is asked, not nvidia-smi: only what torch sees can render.

It runs in a process of its own (``python -m acestep_consumer.multi_gpu.device_count``), so that the caller need not
import torch.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

TIMEOUT_S = 120


class DeviceCountFailed(Exception):
    """Torch gave no answer; the text says why and what to do."""


class DeviceCount(BaseModel):
    """``torch``: its version. ``cuda``, ``hip``: the versions it is built for, or None. ``count``: visible GPUs."""

    model_config = ConfigDict(frozen=True)

    torch: str
    cuda: str | None
    hip: str | None
    count: int


def take(environ: Mapping[str, str]) -> DeviceCount:
    """Ask torch in a process with this environment: what hides GPUs there hides them here.

    Raises:
        CensusFailed: torch is missing, broken, or silent for ``TIMEOUT_S`` seconds.
    """
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(  # noqa: S603 - this module
            command, env=dict(environ), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceCountFailed(
            f"torch did not say within {TIMEOUT_S} s which GPUs it sees; does nvidia-smi hang?"
        ) from error
    # The last line: drivers and plug-ins may print while torch is imported.
    answer = done.stdout.strip().rpartition("\n")[2]
    with suppress(ValidationError):
        return DeviceCount.model_validate_json(answer)
    reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    if "No module named 'torch'" in reason:
        raise DeviceCountFailed("torch is missing: pip install 'acestep-consumer[engine]'")
    raise DeviceCountFailed(f"torch cannot be asked for GPUs: {reason}")


def main() -> None:
    """Print the census as one line of JSON."""
    import torch  # noqa: PLC0415 - here alone: whoever imports this module does not want torch

    found = DeviceCount(
        torch=str(torch.__version__), cuda=torch.version.cuda, hip=torch.version.hip, count=torch.cuda.device_count()
    )
    sys.stdout.write(json.dumps(found.model_dump()) + "\n")


if __name__ == "__main__":
    main()
