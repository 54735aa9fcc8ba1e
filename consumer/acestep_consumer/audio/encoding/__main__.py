# SPDX-License-Identifier: Apache-2.0
"""An encoder process: ``python -m acestep_consumer.audio.encoding FD``; FD is a socket to the renderer.

It encodes songs, measures them, and warps lyrics onto them. A request is a line of JSON with a file descriptor of
shared memory. With ``path`` it is a song to encode, with ``sung`` the attention to its lyrics, which are aligned; with
neither, a song to measure. An answer is a line of JSON, too. The process ends as soon as the socket closes, even in the
middle of a song. Signals for the worker reach it as well (a terminal's Ctrl-C, a service manager's SIGTERM); it ignores
them, since the renderer drains first.

Imports are few: the process starts in a quarter of a second.
"""

import json
import math
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from acestep_consumer.audio.encoding.encode import EncodingFailed, Samples, write_song
from acestep_consumer.audio.formats import Format
from acestep_consumer.audio.measures import measures_of
from acestep_consumer.audio.time_warping import warped

MEMORY_BYTES: Final = 2 << 30
"""Address space. The longest song takes 230 MB of it, FFmpeg's libraries 200 MB."""

NICE: Final = 5
"""Lower priority than the renderer's: its threads launch the GPU's work, and a song that is encoded can wait."""

_REQUEST_BYTES = 1 << 16


def main() -> None:
    """Encode, measure or align one song after the other, until the socket closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipe = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_exit_when_closed, args=(pipe.fileno(),), name="pipe", daemon=True).start()
    while True:
        data, numbers, _, _ = socket.recv_fds(pipe, _REQUEST_BYTES, 1)
        while data and not data.endswith(b"\n"):
            data += pipe.recv(_REQUEST_BYTES)
        if not data:
            return
        pipe.sendall(json.dumps(_answer(json.loads(data), numbers[0])).encode() + b"\n")


def _exit_when_closed(pipe: int) -> None:
    poll = select.poll()
    poll.register(pipe, 0)  # the end of the other side alone
    poll.poll()
    os._exit(0)


def _answer(request: dict[str, Any], samples: int) -> dict[str, Any]:
    try:
        if "sung" in request:
            return asdict(warped(_shared(request["shape"], samples), np.array(request["sung"], dtype=np.bool_)))
        song = _shared((request["channels"], request["samples"]), samples)
        if "path" not in request:
            return {"measures": measures_of(song, request["sample_rate"])}
        wanted = Format(**request["format"])
        levels = write_song(song, Path(request["path"]), wanted, request["sample_rate"], request["threads"])
    except EncodingFailed as error:
        cause = error.__cause__
        return {"failure": str(error), "errno": cause.errno if isinstance(cause, OSError) else None}
    except MemoryError:
        return {"failure": None, "errno": None}
    finally:
        os.close(samples)
    return {"levels": levels and asdict(levels)}


def _shared(shape: Sequence[int], number: int) -> Samples:
    # Unmapped when the last array on it is gone.
    memory = mmap.mmap(number, 0, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, dtype=np.float32, count=math.prod(shape)).reshape(shape)


if __name__ == "__main__":
    main()
