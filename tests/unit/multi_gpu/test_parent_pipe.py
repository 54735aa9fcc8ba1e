# SPDX-License-Identifier: Apache-2.0
"""A terminal that goes is told from an operator who sends SIGHUP."""

import os
import pty

import pytest

from acestep_consumer.multi_gpu import parent_pipe
from acestep_consumer.multi_gpu.parent_pipe import Terminal


def test_a_terminal_is_gone_once_its_other_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr(parent_pipe, "_STDERR", theirs)
    terminal = Terminal()
    assert not terminal.gone()
    os.close(ours)
    assert terminal.gone()
    os.close(theirs)


def test_who_never_had_a_terminal_does_not_lose_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(parent_pipe, "_STDERR", writer)
    assert not Terminal().gone()
    os.close(reader)
    os.close(writer)
