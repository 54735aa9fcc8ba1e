# SPDX-License-Identifier: Apache-2.0
"""Signals to a worker that is leaving already."""

import os
import signal
from collections.abc import Iterator

import pytest

from acestep_consumer.worker.signals import Signals


@pytest.fixture
def restored() -> Iterator[None]:
    """Handlers of this process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_after_the_last_line_of_log_does_not_change_the_exit_code(number: signal.Signals) -> None:
    signals = Signals(lambda: None)
    with signals.handled():
        signals.shut_down()
    os.kill(os.getpid(), number)  # would end the tests


@pytest.mark.usefixtures("restored")
async def test_a_process_that_goes_on_ends_at_a_signal_as_before() -> None:
    signals = Signals(lambda: None)
    with signals.handled():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
