# SPDX-License-Identifier: Apache-2.0
"""The whole worker, command line and all, with another program for its renderer process: ready in two seconds.

Run as ``python -m tests.support.light_worker run``, wherever only the consumer's side of a worker matters.
``LIGHT_S3_READ_S`` is how long it waits for a silent S3 server, in place of half a minute; ``LIGHT_PACE`` divides the
times that tell a living worker from a dead one. Its multipart uploads have parts of 8 MiB, so that tests need not send
songs of hundreds.
"""

import os

from acestep_consumer import app
from acestep_consumer.cli import main
from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.adapters import RendererSupervisor
from acestep_consumer.engine.renderer.checkpoints.checkpoint_check import check_checkpoints
from acestep_consumer.execution import retries
from acestep_consumer.storage.s3 import client, objects


def check_if_named(settings: EngineSettings) -> None:
    """Check the models of a folder that is named: a light worker needs none."""
    if settings.checkpoint_dir is not None:
        check_checkpoints(settings)


if __name__ == "__main__":
    client._READ_S = int(os.environ.get("LIGHT_S3_READ_S", client._READ_S))  # type: ignore[misc]
    pace = float(os.environ.get("LIGHT_PACE", "1"))
    retries.RENEW_S, retries.LOOK_S = retries.RENEW_S / pace, retries.LOOK_S / pace
    objects.PART_BYTES = 8 << 20  # type: ignore[misc]
    RendererSupervisor.module = "tests.support.light_engine"
    app.check_checkpoints = check_if_named  # type: ignore[attr-defined]  # imported there
    main()
