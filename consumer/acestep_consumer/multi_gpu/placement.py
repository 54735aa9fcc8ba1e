# SPDX-License-Identifier: Apache-2.0
"""Computes what differs from worker to worker: GPU, worker id, port. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from acestep_consumer.config.cores import encoder_count
from acestep_consumer.config.settings import EngineSettings, Settings, WorkerSettings
from acestep_consumer.multi_gpu.selection import Gpu

_LONGEST_ID, _LAST_PORT = 128, 65_535
_FIRST_GPU = ("auto", "cuda", "cuda:0")


class ConflictingSetting(Exception):
    """A setting does not work with several workers; the message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker's ``name`` in the parent's log, and the part of its ``environment`` that differs from the others'."""

    name: str
    environment: Mapping[str, str]


def check(engine: EngineSettings) -> None:
    """Check that the settings leave the choice of devices to ``--gpus``.

    Raises:
        ConflictingSetting: they do not.
    """
    if engine.device.strip().lower() not in _FIRST_GPU[:2]:
        raise ConflictingSetting(f"--gpus and ACESTEP_DEVICE={engine.device} both choose the device; drop one of them")
    if engine.lm_device.strip().lower() not in (*_FIRST_GPU, "cpu"):
        raise ConflictingSetting(
            f"ACESTEP_LM_DEVICE={engine.lm_device}: with --gpus each worker sees only its own GPU; unset it"
        )


def place(gpus: Sequence[Gpu], settings: Settings, *, log_format: Literal["console", "json"]) -> tuple[Placement, ...]:
    """Return a placement for each GPU.

    A worker sees only its own GPU, as ``cuda:0``. Setting ``ACESTEP_DEVICE=cuda:2`` would not be enough: vLLM uses the
    first GPU that it sees.

    Raises:
        ConflictingSetting: the worker id is too long or the ports run out.
    """
    base = settings.worker.id_or_own
    return tuple(
        Placement(
            name=gpu.name,
            environment={
                **gpu.visibility,
                "ACESTEP_DEVICE": "cuda:0",
                "ACESTEP_WORKER_ID": _worker_id(base, gpu),
                "ACESTEP_HTTP_PORT": str(_port(settings.worker, position)),
                "ACESTEP_LOG_FORMAT": log_format,
                "ACESTEP_ENCODERS": str(encoder_count(settings.engine.encoders, len(gpus))),
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
    """Return the configured port for the first worker, the next one for the second; 0, any free one, for all."""
    port = worker.http_port and worker.http_port + position
    if port > _LAST_PORT:
        raise ConflictingSetting(
            f"ACESTEP_HTTP_PORT={worker.http_port}: each worker uses the next port, and {port} does not exist; lower it"
        )
    return port
