# SPDX-License-Identifier: Apache-2.0
"""Engine processes that only start: ``python -m tests.support.light_start FD``.

The renderer says that its device has ``LIGHT_CARD_GB``, waits until the file ``LIGHT_MAY_BE_READY`` is there, and is
ready. The planner writes the settings that it loads with into the folder ``LIGHT_LOADED``, one file each; with
``LIGHT_CROWDED`` it dies of them when they say that the renderer is loading too.
"""

import os
import socket
import sys
import time
from pathlib import Path

from acestep_consumer.engine.framing import FrameSocket
from acestep_consumer.engine.messages import (
    FROM_ENGINE,
    TO_ENGINE,
    Configure,
    ConfigurePlanner,
    DeviceFound,
    FromEngine,
    Loading,
    LoadModels,
    PlannerReport,
    Ready,
    RendererReport,
)


def main() -> None:
    pipe = FrameSocket(socket.socket(fileno=int(sys.argv[1])))
    messages = (TO_ENGINE.validate_json(payload) for payload in pipe)

    def send(message: FromEngine) -> None:
        pipe.send(FROM_ENGINE.dump_json(message))

    first = next(messages)
    if isinstance(first, Configure):
        send(DeviceFound(device="cuda:0", vram_gb=float(os.environ["LIGHT_CARD_GB"])))
        while not Path(os.environ["LIGHT_MAY_BE_READY"]).exists():
            time.sleep(0.01)
        send(Ready(report=RendererReport(device="cuda:0", device_name="card", vram_gb=1, models=(), formats=())))
    elif isinstance(first, ConfigurePlanner):
        if first.wait:
            send(Loading(step="waiting", phase="waiting"))
            first = next(each.configure for each in messages if isinstance(each, LoadModels))
        loaded = Path(os.environ["LIGHT_LOADED"])
        name = f"{len(list(loaded.iterdir()))}.json"
        (loaded.with_name(name)).write_bytes(TO_ENGINE.dump_json(first))
        (loaded.with_name(name)).rename(loaded / name)  # whole, or not there
        if first.beside and "LIGHT_CROWDED" in os.environ:
            sys.exit(6)
        send(Ready(report=PlannerReport(model=first.model, backend="vllm")))
    for _ in messages:
        pass


if __name__ == "__main__":
    main()
