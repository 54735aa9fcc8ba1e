# SPDX-License-Identifier: Apache-2.0
"""For programs that want songs: submit requests, hear what becomes of them, download. Needs the base install only.

>>> async with Client() as client:
...     job = await client.start({"prompt": "slow jazz", "audio_duration": 30})
...     async for event in job.events():
...         print(event.state)
...     files = await job.result("songs")

``acestep_consumer.client.sync`` is the same without ``async``, for scripts, the REPL and notebooks.

Reading order: ``client`` (what it can do), ``job`` (one job as its producer sees it), ``subscription`` (events without
gaps and repeats), ``inbox`` (which event is whose), ``line`` (the connection), ``endings`` and ``download`` (results in
S3), ``pace`` (when to try again), ``outlook`` and ``muster`` (what a request can expect), ``errors``.
"""

from acestep_consumer.client.client import Client
from acestep_consumer.client.errors import (
    ClientError,
    DownloadFailed,
    InvalidTaskId,
    NoQueue,
    NoSongs,
    NotEndedYet,
    QueueFull,
    Unreachable,
)
from acestep_consumer.client.estimate import Outlook
from acestep_consumer.client.job import Job

__all__ = [
    "Client",
    "ClientError",
    "DownloadFailed",
    "InvalidTaskId",
    "Job",
    "NoQueue",
    "NoSongs",
    "NotEndedYet",
    "Outlook",
    "QueueFull",
    "Unreachable",
]
