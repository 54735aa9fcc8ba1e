# SPDX-License-Identifier: Apache-2.0
"""What differs from worker to worker in a fleet: its GPU, its name, its port. Pure."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from acestep_consumer.config.settings import EngineSettings, Settings, WorkerSettings
from acestep_consumer.multi_gpu.selection import Gpu

_LONGEST_ID, _LAST_PORT = 128, 65_535
_THE_ONE = ("auto", "cuda", "cuda:0")


class ConflictingSetting(Exception):
    """A setting cannot hold for several workers; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker's place: its ``name`` in the fleet's log, and ``environment``, what its own has beyond the others'."""

    name: str
    environment: Mapping[str, str]


def check(engine: EngineSettings) -> None:
    """Make sure that the settings leave the choice of devices to the fleet.

    Raises:
        Contradiction: they do not.
    """
    if engine.device.strip().lower() not in _THE_ONE[:2]:
        raise ConflictingSetting(
            f"--gpus decides the device, and ACESTEP_DEVICE={engine.device} does too; drop one of them"
        )
    if engine.lm_device.strip().lower() not in (*_THE_ONE, "cpu"):
        raise ConflictingSetting(
            f"ACESTEP_LM_DEVICE={engine.lm_device}: with --gpus each worker sees its own GPU alone; unset it"
        )


def seats_for(
    gpus: Sequence[Gpu], settings: Settings, *, log_format: Literal["console", "json"]
) -> tuple[Placement, ...]:
    """Seat one worker at each GPU.

    A worker sees its own GPU and no other, so for it that is ``cuda:0``. ``ACESTEP_DEVICE=cuda:2`` alone would not do:
    vLLM takes the first GPU that it sees, whatever torch was told.

    Raises:
        Contradiction: the name or the port that is set does not fit.
    """
    base = settings.worker.worker_id or f"{socket.gethostname().split('.')[0]}-{os.getpid()}"
    return tuple(
        Placement(
            name=gpu.name,
            environment={
                **gpu.visibility,
                "ACESTEP_DEVICE": "cuda:0",
                "ACESTEP_WORKER_ID": _worker_id(base, gpu),
                "ACESTEP_HTTP_PORT": str(_port(settings.worker, position)),
                "ACESTEP_LOG_FORMAT": log_format,
            },
        )
        for position, gpu in enumerate(gpus)
    )


def _worker_id(base: str, gpu: Gpu) -> str:
    worker_id = f"{base}-{gpu.name}"
    if len(worker_id) > _LONGEST_ID:
        raise ConflictingSetting(f"ACESTEP_WORKER_ID: {worker_id} is longer than {_LONGEST_ID} characters; shorten it")
    return worker_id


def _port(worker: WorkerSettings, position: int) -> int:
    """The port that was set for the first worker, the next for the second; 0, a free one, for all."""
    port = worker.http_port and worker.http_port + position
    if port > _LAST_PORT:
        raise ConflictingSetting(
            f"ACESTEP_HTTP_PORT={worker.http_port}: each worker takes the next one, and {port} is no port; lower it"
        )
    return port
