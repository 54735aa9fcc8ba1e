# SPDX-License-Identifier: Apache-2.0
"""Streams several songs as one ZIP archive: neither this server nor the browser holds more than a chunk of it."""

import io
import zipfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.domain.ports import ObjectStream
from acestep_consumer.webui.audio_proxy import AudioProxy, SongUnavailable
from acestep_consumer.webui.job_view import file_name
from acestep_schemas.events import Audio, FileObject

CONTENT_TYPE: Final = "application/zip"


class ArchivedSong(NamedTuple):
    """A song to put into the archive."""

    task_id: str
    audio: Audio


class ArchiveIncomplete(Exception):
    """Storage failed in the middle of a song: what was sent of the archive is no archive."""


async def archive(proxy: AudioProxy, songs: Sequence[ArchivedSong]) -> AsyncIterator[bytes]:
    """Yield a ZIP file of the songs and their lyrics with times, which are stored, not compressed.

    A file that is gone is a text that says why.

    Raises:
        ArchiveIncomplete: see there.
    """
    written = _Output()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as zipped:
        for task_id, file in ((song.task_id, file) for song in songs for file in _files(song.audio)):
            name = file_name(task_id, file)
            try:
                proxy.check(task_id, file)
                async with proxy.opened(file) as stream:
                    with zipped.open(_entry(name, file.bytes), "w") as entry:
                        async for chunk in _read(stream):
                            entry.write(chunk)
                            yield written.take()
            except SongUnavailable as error:
                zipped.writestr(_entry(f"{name}.missing.txt", 0), f"{error}\n")
            yield written.take()
    yield written.take()


def _files(audio: Audio) -> tuple[Audio | FileObject, ...]:
    return (audio, *audio.lyric_files.values())


async def _read(stream: ObjectStream) -> AsyncIterator[bytes]:
    try:
        async for chunk in stream:
            yield chunk
    except StorageUnavailable as error:
        raise ArchiveIncomplete(str(error)) from error


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, datetime.now(UTC).timetuple()[:6])
    entry.file_size = size  # decides whether it needs the format for files beyond 4 GiB
    return entry


class _Output(io.RawIOBase):
    """Collects what is written to it. It cannot seek, so sizes and checksums follow the songs."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, chunk: Any) -> int:
        data = bytes(chunk)
        self._chunks.append(data)
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data, self._chunks = b"".join(self._chunks), []
        return data
