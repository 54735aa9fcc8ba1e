# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's Multi-Process Service (MPS): kernels of the renderer and of the planner run on one GPU at the same time.

Without it two processes take turns on a GPU, so that neither fills the gaps of the other. A worker starts a control
daemon of its own, unless the operator runs one; its socket is in a folder of the worker, and it ends with the worker.
The daemon must be there before an engine process first calls CUDA.
"""

import asyncio
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

CONTROL: Final = "nvidia-cuda-mps-control"
PIPE_DIRECTORY, LOG_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"

_SYSTEM_SOCKET: Final = Path("/tmp/nvidia-mps/control")  # noqa: S108 - where NVIDIA's daemon listens by default
_PREFIX: Final = "acestep-mps-"
_WITHIN_S: Final = 10.0
_END_S: Final = 5.0
_UUIDS: Final = ("GPU-", "MIG-")

# The daemon ends with this process, however that ends. Linux' signal of a parent's death survives the exec.
_LAUNCH: Final = (
    "import ctypes, os, signal, sys; "
    "ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0); "
    "os.execv(sys.argv[1], [sys.argv[1], '-f'])"
)
_CAN_CONNECT: Final = "import ctypes, sys; sys.exit(ctypes.CDLL('libcuda.so.1').cuInit(0) != 0)"

log = structlog.get_logger()


class MpsUnavailable(Exception):
    """MPS cannot be used here; the message says why."""


def operators_daemon(environ: Mapping[str, str]) -> bool:
    """Whether the engines will use a daemon that the operator has started."""
    return PIPE_DIRECTORY in environ or _SYSTEM_SOCKET.exists()


class MpsDaemon:
    """A control daemon of this worker: ``start`` it, give the engines ``environment``, then ``stop`` it."""

    def __init__(self) -> None:
        _remove_left_folders()
        self._folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")  # not longer: a socket's path is short
        self._process: Process | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables by which a CUDA program finds the daemon."""
        return {PIPE_DIRECTORY: self._folder, LOG_DIRECTORY: self._folder}

    async def start(self) -> None:
        """Start it, and check that a CUDA program can connect to it.

        Raises:
            MpsUnavailable: it is not installed, or does not work here.
        """
        program = shutil.which(CONTROL)
        if program is None:
            raise MpsUnavailable(f"{CONTROL} is not installed; it comes with NVIDIA's driver")
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _LAUNCH,
                program,
                env=self._variables(),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=DEVNULL,
            )
            async with asyncio.timeout(_WITHIN_S):
                while await self._run(program, send="get_server_list\n"):
                    if self._process.returncode is not None:
                        raise MpsUnavailable(f"{CONTROL} ended with status {self._process.returncode}")
                    await asyncio.sleep(0.1)
                if await self._run(sys.executable, "-c", _CAN_CONNECT):
                    raise MpsUnavailable("CUDA programs cannot connect to the daemon")
        except TimeoutError as error:
            raise MpsUnavailable(f"{CONTROL} did not answer within {_WITHIN_S:g} s") from error
        except OSError as error:
            raise MpsUnavailable(f"{CONTROL} cannot be run: {error.strerror}") from error

    async def stop(self) -> None:
        """End it and remove its folder; after the engines, whose connection to the GPU it is."""
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(_END_S):
                    await self._run(shutil.which(CONTROL) or CONTROL, send="quit\n")
                    await process.wait()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _run(self, *command: str, send: str = "") -> int:
        """Run a program as a client of the daemon; return its exit code."""
        process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **self.environment}, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL
        )
        try:
            await process.communicate(send.encode())
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return process.returncode or 0

    def _variables(self) -> dict[str, str]:
        """Return the daemon's environment.

        It numbers the GPUs that it sees anew. A number in its ``CUDA_VISIBLE_DEVICES`` would be applied twice, so that
        it keeps UUIDs alone.
        """
        variables = {**os.environ, **self.environment}
        if not variables.get("CUDA_VISIBLE_DEVICES", "").startswith(_UUIDS):
            variables.pop("CUDA_VISIBLE_DEVICES", None)
        return variables


def _remove_left_folders() -> None:
    """Remove what workers left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


async def start_mps(*, wanted: bool | None) -> MpsDaemon | None:
    """Start a daemon for this worker's engines; None: they do without one of its own.

    ``wanted``: None starts one where that works.

    Raises:
        MpsUnavailable: ``wanted`` is True, and it does not work here.
    """
    if operators_daemon(os.environ):
        log.info("CUDA MPS: the daemon that runs on this machine is used")
        return None
    if wanted is None and shutil.which(CONTROL) is None:
        return None
    daemon = MpsDaemon()
    try:
        await daemon.start()
    except BaseException as error:
        await daemon.stop()
        if wanted or not isinstance(error, MpsUnavailable):
            raise
        log.info("CUDA MPS is not used: the engines share the GPU by turns", reason=str(error))
        return None
    log.info("CUDA MPS: the engines run on the GPU at the same time")
    return daemon
