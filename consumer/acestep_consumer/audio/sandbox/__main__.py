# SPDX-License-Identifier: Apache-2.0
"""The decoder process: an audio file on standard input, stereo samples on standard output, the result as exit code.

Samples are float32 in this machine's byte order, left and right interleaved. Arguments: the sample rate (Hz), the
maximum of samples per channel, then the limits: CPU seconds, wall-clock seconds, bytes of memory.
"""

import io
import struct
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO, Final, cast

import av
import av.subtitles.codeccontext  # PyAV imports it at the first such stream, when no file can be opened any more
from av.audio.frame import AudioFrame
from av.container import InputContainer

from acestep_consumer.audio.sandbox.exit_codes import DecodeExit
from acestep_consumer.audio.sandbox.landlock import ProcessLimits, confine

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

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

_OGG_HEADER_BYTES: Final = 27
_OGG_BEGINS: Final = 2


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
    for link in _ogg_links(source):
        with av.open(link, mode="r", options=options) as container:
            for frame in _resampled(container, sample_rate):
                samples += frame.samples
                if samples > max_samples:
                    raise _Unusable(DecodeExit.TOO_LONG)
                target.write(_stereo(frame))
    target.flush()
    return DecodeExit.STEREO if samples else DecodeExit.NO_SOUND


class _Section(io.RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        super().__init__()
        self._file, self._start, self._end, self._at = file, start, end, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._at)
        found = self._file.read(min(len(view), max(0, self._end - self._at)))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        self._at = max(self._start, base + offset)
        return self.tell()

    def tell(self) -> int:
        return self._at - self._start


def _ogg_links(source: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the links of a chained Ogg file, one after the other; any other file is yielded as it is.

    A link is a complete stream. FFmpeg refuses a file whose links differ in rate or channels.
    """
    starts = tuple(_ogg_link_starts(source))
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    if len(starts) <= 1:
        yield source
        return
    for start, end in pairwise((*starts, size)):
        yield cast("BinaryIO", _Section(source, start, end))


def _ogg_link_starts(source: BinaryIO) -> Iterator[int]:
    """Yield where links start: at a page that begins a stream and does not follow another such page."""
    at, after_first_page = 0, False
    while True:
        source.seek(at)
        header = source.read(_OGG_HEADER_BYTES)
        if len(header) < _OGG_HEADER_BYTES or header[:4] != b"OggS":
            return
        begins = bool(header[5] & _OGG_BEGINS)
        if begins and not after_first_page:
            yield at
        after_first_page = begins
        segments = source.read(header[26])
        at += _OGG_HEADER_BYTES + len(segments) + sum(segments)


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
    resampled: tuple[object, ...] = ()
    for frame in container.decode(stream):
        # A track may change in the middle: in FLAC, MP3 and AAC each frame has a rate and channels of its own.
        form = frame.sample_rate, frame.format.name, frame.layout.name
        if resampler is not None and form != resampled:
            yield from resampler.resample(None)
        if resampler is None or form != resampled:
            # FFmpeg's conversion of mono to stereo is quieter, so mono stays mono here and is doubled below.
            layout = "mono" if frame.layout.nb_channels == 1 else "stereo"
            resampler, resampled = av.AudioResampler(format="flt", layout=layout, rate=sample_rate), form
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
