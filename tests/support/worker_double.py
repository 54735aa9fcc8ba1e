# SPDX-License-Identifier: Apache-2.0
"""A worker without jobs, for a worker group: it notes the signals it gets and does what ``DOUBLE`` says.

``exit N``: leave at once with N. ``deaf``: let signals do what they do by default. ``drain``: note each signal in the
file ``NOTES``, and after the first one leave with 0 as soon as there is a file ``RELEASE``. Of several, separated by
commas, each start takes the next; the last one stays.
"""

import os
import signal
import sys
import time
from pathlib import Path

from acestep_consumer.multi_gpu.parent_pipe import exit_with_parent

GIVES_UP_S = 600.0


def main() -> int:
    what, _, code = this_time().partition(" ")
    if what == "exit":
        return int(code)
    exit_with_parent(int(sys.argv[sys.argv.index("--lifeline") + 1]), labelled="LABELLED" in os.environ)
    heard = note_signals(Path(os.environ["NOTES"])) if what == "drain" else []
    sys.stderr.write("up\n")
    deadline = time.monotonic() + GIVES_UP_S
    while not (heard and Path(os.environ["RELEASE"]).exists()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sys.stderr.write("left\n")
    return 0


def this_time() -> str:
    """What this start is to do; a file beside ``NOTES`` counts starts."""
    steps = os.environ["DOUBLE"].split(",")
    starts = Path(os.environ["NOTES"]).with_suffix(".starts")
    with starts.open("a") as file:
        file.write("I")
    return steps[min(starts.stat().st_size, len(steps)) - 1]


def note_signals(notes: Path) -> list[int]:
    """Append the name of each signal to a file and its number to a list."""
    heard: list[int] = []

    def note(number: int, _: object) -> None:
        heard.append(number)
        with notes.open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # as the real one does
    return heard


if __name__ == "__main__":
    sys.exit(main())
