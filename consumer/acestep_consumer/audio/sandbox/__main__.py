# SPDX-License-Identifier: Apache-2.0
"""The decoder process: an audio file on standard input, stereo samples on standard output, the result as exit code.

Samples are float32 in this machine's byte order, left and right interleaved. Arguments: the sample rate (Hz), the
maximum of samples per channel, then the limits: CPU seconds, wall-clock seconds, bytes of memory.
"""

import io
import struct
import sys
from collections.abc import Iterator
from typing import BinaryIO, Final, cast

import av
import av.subtitles.codeccontext  # PyAV imports it at the first such stream, when no file can be opened any more
from av.audio.frame import AudioFrame
from av.container import InputContainer

from acestep_consumer.audio.sandbox.exit_codes import DecodeExit
from acestep_consumer.audio.sandbox.landlock import ProcessLimits, confine

FRAME_BYTES: Final = 8
"""One sample of both channels."""

# FFmpeg also reads playlists, which name other files and hosts: plain containers only, no protocol, and audio codecs
# only. It would otherwise decode pictures and subtitles, too.
_CONTAINERS: Final = (
    "aac,ac3,aiff,amr,ape,asf,au,caf,eac3,flac,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,ogg,tta,w64,wav,wv"
)
_CODECS: Final = frozenset(
    {
        "aac", "aac_latm", "ac3", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "alac", "amrnb", "amrwb", "ape", "eac3",
        "flac", "gsm", "gsm_ms", "libopus", "libvorbis", "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float",
        "opus", "tta", "vorbis", "wavpack", "wmalossless", "wmapro", "wmav1", "wmav2",
    }
)  # fmt: skip


class _Unusable(Exception):
    """The input cannot be used, for a reason other than a decoding error."""

    def __init__(self, code: DecodeExit) -> None:
        super().__init__(code.name)
        self.code = code


def main() -> None:
    """Confine this process, decode, and exit with the result."""
    sample_rate, max_samples, cpu_s, wall_s, memory_bytes = map(int, sys.argv[1:6])
    _import_lazy_modules()
    confine(ProcessLimits(cpu_s, wall_s, memory_bytes, output_bytes=max_samples * FRAME_BYTES))
    sys.exit(run(sys.stdin.buffer, sys.stdout.buffer, sample_rate, max_samples))


def run(source: BinaryIO, target: BinaryIO, sample_rate: int, max_samples: int) -> DecodeExit:
    """Decode ``source`` into ``target``; never raises for what the source holds."""
    try:
        return _decode(source, target, sample_rate, max_samples)
    except _Unusable as unusable:
        return unusable.code
    except MemoryError:  # FFmpeg's as well
        return DecodeExit.TOO_MUCH_MEMORY
    except (av.FFmpegError, ValueError):
        return DecodeExit.NOT_AUDIO
    except OSError:  # of the target: errors of the source are FFmpeg's
        return DecodeExit.NO_ROOM


def _import_lazy_modules() -> None:
    """Decode a moment of silence, which imports what is imported lazily: later no file can be opened."""
    head = b"RIFF", 38, b"WAVE", b"fmt ", 16, 1, 1, 8_000, 16_000, 2, 16, b"data", 2
    silence = struct.pack("<4sI4s4sIHHIIHH4sI", *head) + bytes(2)
    run(io.BytesIO(silence), io.BytesIO(), sample_rate=8_000, max_samples=1)


def _decode(source: BinaryIO, target: BinaryIO, sample_rate: int, max_samples: int) -> DecodeExit:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none", "codec_whitelist": _known_codecs()}
    samples = 0
    with av.open(source, mode="r", options=options) as container:
        for frame in _resampled(container, sample_rate):
            samples += frame.samples
            if samples > max_samples:
                raise _Unusable(DecodeExit.TOO_LONG)
            target.write(_stereo(frame))
    target.flush()
    return DecodeExit.STEREO if samples else DecodeExit.NO_SOUND


def _known_codecs() -> str:
    return ",".join(name for name in av.codecs_available if name in _CODECS or name.startswith("pcm_"))


def _resampled(container: InputContainer, sample_rate: int) -> Iterator[AudioFrame]:
    """Decode the first audio track, frame by frame."""
    if not container.streams.audio:
        raise _Unusable(DecodeExit.NO_AUDIO_TRACK)
    stream = container.streams.audio[0]
    # FFmpeg applies the whitelist when it probes the file; the decoder itself is opened here.
    if stream.codec_context is None or stream.codec_context.name not in _known_codecs().split(","):
        raise _Unusable(DecodeExit.NOT_AUDIO)
    stream.codec_context.thread_count = 1
    resampler: av.AudioResampler | None = None
    for frame in container.decode(stream):
        if resampler is None:
            # FFmpeg's conversion of mono to stereo is quieter, so mono stays mono here and is doubled below.
            layout = "mono" if frame.layout.nb_channels == 1 else "stereo"
            resampler = av.AudioResampler(format="flt", layout=layout, rate=sample_rate)
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _stereo(frame: AudioFrame) -> memoryview | bytearray:
    """Return the frame's samples, left and right interleaved."""
    channels = frame.layout.nb_channels
    plane = memoryview(cast("bytes", frame.planes[0])).cast("B")[: frame.samples * channels * 4]
    if channels != 1:
        return plane
    both = bytearray(2 * len(plane))
    pairs = memoryview(both).cast("f")
    pairs[::2] = pairs[1::2] = plane.cast("f")
    return both


if __name__ == "__main__":
    main()
