# SPDX-License-Identifier: Apache-2.0
"""How a decoder process ends when it is not killed: its exit code. No text of the child's is ever believed."""

from enum import IntEnum


class DecodeExit(IntEnum):
    """Exit codes. Python's own are below 10, a shell's above 125."""

    STEREO = 0
    NO_AUDIO_TRACK = 10
    NO_SOUND = 11
    NOT_AUDIO = 12
    TOO_LONG = 13
    TOO_MUCH_MEMORY = 14
    NO_ROOM = 15
