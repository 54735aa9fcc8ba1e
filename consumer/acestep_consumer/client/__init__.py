# SPDX-License-Identifier: Apache-2.0
"""The Python client: submit requests, follow jobs, download songs. Importing it needs aio-pika and pydantic alone.

>>> async with Client() as client:
...     job = await client.start({"prompt": "slow jazz", "audio_duration": 30})
...     async for event in job.events():
...         print(event.state)
...     files = await job.result("songs")

``acestep_consumer.client.sync`` is the same without ``async``, for scripts, the REPL and notebooks. Type checkers
narrow an event by its ``state``: after ``if event.state == "completed"``, ``event.data.audios`` is known.

Reading order: ``client`` (submit, subscribe, cancel), ``job`` (handle of one job), ``subscription`` (events without
gaps or duplicates), ``dispatcher`` (which event belongs to which job), ``connection``, ``results`` and ``download``
(S3), ``estimate`` and ``worker_survey`` (queue position and waiting time), ``errors``.
"""

from acestep_consumer.client.client import Client
from acestep_consumer.client.errors import (
    ClientError,
    DownloadFailed,
    InvalidTaskId,
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobRejectedError,
    NoQueue,
    NoSongs,
    NotEndedYet,
    QueueFull,
    Unreachable,
)
from acestep_consumer.client.estimate import QueueEstimate as Outlook
from acestep_consumer.client.job import JobHandle as Job
from acestep_schemas.request_body import RequestBody

__all__ = [
    "Client",
    "ClientError",
    "DownloadFailed",
    "InvalidTaskId",
    "Job",
    "JobCancelledError",
    "JobExpiredError",
    "JobFailedError",
    "JobRejectedError",
    "NoQueue",
    "NoSongs",
    "NotEndedYet",
    "Outlook",
    "QueueFull",
    "RequestBody",
    "Unreachable",
]
