# SPDX-License-Identifier: Apache-2.0
"""Heartbeats of an engine process while it loads.

Loading may take half an hour without a message: a slow disk, a download, a compilation. A thread shows meanwhile that
the process runs at all, so that one that was paused, or hangs in a driver, is not waited for that long.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

EVERY_S: Final = 5.0


@contextmanager
def heartbeat(beat: Callable[[], object], every_s: float = EVERY_S) -> Iterator[None]:
    """Call ``beat`` in a thread, at once and then every so many seconds; never again after the body."""
    over = threading.Event()

    def run() -> None:
        beat()
        while not over.wait(every_s):
            beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
