# SPDX-License-Identifier: Apache-2.0
"""The renderer process before it has read its first message."""

import signal
import sys

import pytest

from acestep_consumer.engine.renderer import __main__ as renderer


class PipeOpened(Exception):
    """The process has come to its pipe."""


def open_pipe(number: int) -> None:
    raise PipeOpened(number)


def test_the_device_s_thread_gets_the_interpreter_within_half_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", intervals.append)
    monkeypatch.setattr(sys, "argv", ["renderer", "7"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(renderer, "RendererPipe", open_pipe)
    with pytest.raises(PipeOpened, match="7"):
        renderer.main()
    assert intervals == [0.0005]
