# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer``, also as ``python -m acestep_consumer``: loads the command line and runs it."""

import signal


def main() -> None:
    """Run the command line. Ctrl-C ends it quietly from the first moment on.

    Loading takes a third of a second. An exception in the middle of it would be a traceback, or get lost in somebody's
    ``except``; so until then the signal simply ends the process.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from acestep_consumer.cli import main as run  # noqa: PLC0415 - the point of it

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
