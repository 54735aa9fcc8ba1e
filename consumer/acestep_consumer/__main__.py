# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``acestep-consumer`` and ``python -m acestep_consumer``: loads and runs the command line."""

import signal


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback, also while it is being loaded.

    Loading takes a third of a second. A KeyboardInterrupt during an import would print a traceback or be swallowed, so
    until then the signal has its default effect and ends the process.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from acestep_consumer.cli import main as run  # noqa: PLC0415 - after the signal handler is set

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
