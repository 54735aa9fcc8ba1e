# SPDX-License-Identifier: Apache-2.0
"""Exit codes of a decoder process that is not killed. Its text output is for the log alone: it may be forged."""

from enum import IntEnum


class DecodeExit(IntEnum):
    """Exit codes. Those of Python are below 10, those of a shell above 125."""

    STEREO = 0
    NO_AUDIO_TRACK = 10
    NO_SOUND = 11
    NOT_AUDIO = 12
    TOO_LONG = 13
    TOO_MUCH_MEMORY = 14
    NO_ROOM = 15
