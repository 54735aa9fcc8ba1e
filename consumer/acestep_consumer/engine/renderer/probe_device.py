# SPDX-License-Identifier: Apache-2.0
"""Device probe: ``python -m acestep_consumer.engine.renderer.probe_device DEVICE`` prints the device as JSON.

For ``plan`` and ``doctor``, which must not import torch themselves.
"""

import json
import sys
from dataclasses import asdict

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.renderer.device import DeviceError, inspect


def main() -> None:
    """Print the device's name in torch, its product name and its memory in GiB (0: no GPU)."""
    try:
        found = inspect(EngineSettings(device=sys.argv[1]))
    except DeviceError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
