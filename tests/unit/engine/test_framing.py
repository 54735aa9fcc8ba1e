# SPDX-License-Identifier: Apache-2.0
"""The engine's end of the pipe."""

import socket

from acestep_consumer.engine import framing
from acestep_consumer.engine.framing import FrameSocket


def test_payloads_end_when_the_other_side_closes_whether_or_not_it_has_read_everything() -> None:
    for unread in (b"", b"a message that nobody reads"):
        theirs, ours = socket.socketpair()
        with ours:
            frames = FrameSocket(ours)
            theirs.sendall(framing.pack(b"first") + framing.pack(b"second")[:3])
            if unread:
                frames.send(unread)
            received = iter(frames)
            assert next(received) == b"first"
            theirs.close()
            assert list(received) == []
            frames._reader.close()
