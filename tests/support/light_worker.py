# SPDX-License-Identifier: Apache-2.0
"""The whole worker, command line and all, with another program for its renderer process: ready in two seconds.

Run as ``python -m tests.support.light_worker run``, wherever only the consumer's side of a worker matters.
``LIGHT_S3_READ_S`` is how long it waits for a silent S3 server, in place of half a minute.
"""

import os

from acestep_consumer.cli import main
from acestep_consumer.engine.adapters import RendererSupervisor
from acestep_consumer.storage import s3_client

if __name__ == "__main__":
    s3_client._READ_S = int(os.environ.get("LIGHT_S3_READ_S", s3_client._READ_S))  # type: ignore[misc]
    RendererSupervisor.module = "tests.support.light_engine"
    main()
