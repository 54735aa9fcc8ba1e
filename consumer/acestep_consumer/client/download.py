# SPDX-License-Identifier: Apache-2.0
"""Downloads songs to files, with resume: each file appears whole and verified, or not at all."""

import asyncio
import hashlib
import logging
import os
import re
import sys
from collections.abc import AsyncIterable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final
from uuid import uuid4

import aiohttp

from acestep_consumer.broker.backoff import backoff
from acestep_consumer.client.errors import DownloadFailed
from acestep_consumer.client.results import Results
from acestep_consumer.config.http import NETWORK_ERRORS, authorities, open_session
from acestep_consumer.domain.errors import StorageUnavailable
from acestep_consumer.domain.objects import ByteRange
from acestep_schemas.events import Audio, Completed, FileObject

# Tries in a row that brought no byte.
TRIES: Final = 5
CONCURRENT_SONGS: Final = 4

_CHUNK_BYTES: Final = 1 << 20
_OWN_DIGITS: Final = 8
_OK, _PARTIAL, _FORBIDDEN, _NOT_FOUND, _UNSATISFIABLE = 200, 206, 403, 404, 416
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}")
_log: Final = logging.getLogger("acestep_consumer.client")


class _RetryDownload(Exception):
    """A try failed; another one may succeed."""


async def download(job: Completed, folder: Path, results: Results | None) -> tuple[Path, ...]:
    """Write the songs of a job to ``folder`` (created when missing) as ``<task id>-<index>.<ending>``.

    Lyrics with times are written beside them, ``.lrc`` and ``.vtt``. Returns the songs' paths. A file that exists
    already and is right is left alone. A call that fails, is cancelled or is killed leaves what it has of a file in
    ``<name>.part`` for the next one, which resumes it.

    Args:
        job: names the songs, with sizes and digests.
        folder: the folder of the files.
        results: reads songs with this program's own keys; None, or where these do not suffice: by the job's URLs.

    Raises:
        DownloadFailed: a song cannot be fetched, or differs from its event in size or SHA-256.
        OSError: the folder cannot be written, or the disk is full.
    """
    paths = [folder / _name(job, audio) for audio in job.audios]
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    slots = asyncio.Semaphore(CONCURRENT_SONGS)
    # The same certificate authorities as for S3 calls.
    connector = aiohttp.TCPConnector(ssl=authorities(os.environ.get("AWS_CA_BUNDLE")))
    async with open_session(connector, trust_env=True) as session:

        async def fetch(file: Audio | FileObject, path: Path) -> None:
            async with slots:
                await _Download(session, file, path, results).run()

        songs = tuple(zip(job.audios, paths, strict=True))
        files: list[tuple[Audio | FileObject, Path]] = [*songs, *_lyric_files(songs)]
        tasks = [asyncio.ensure_future(fetch(*file)) for file in files]
        try:
            await asyncio.gather(*tasks)
        finally:  # the first failure ends the others; their parts stay for the next call
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(paths)


def _lyric_files(songs: Iterable[tuple[Audio, Path]]) -> Iterator[tuple[FileObject, Path]]:
    """Yield the files beside songs that people read, and the path of each."""
    for audio, path in songs:
        for kind, file in audio.lyric_files.items():
            yield file, path.with_suffix(f".{kind}")


class _Download:
    """The download of one file to ``<name>.part``, which is renamed when size and SHA-256 are right.

    Two programs that fetch the same song into the same folder never write one file: a lock on the part, which ends with
    its program, makes the second one use a part of its own.
    """

    def __init__(
        self, session: aiohttp.ClientSession, file: Audio | FileObject, path: Path, results: Results | None
    ) -> None:
        self._session = session
        self._file = file
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._results = results

    async def run(self) -> None:
        if await asyncio.to_thread(self._is_right, self._path):
            return
        with self._locked_part():
            await self._fetch()

    @contextmanager
    def _locked_part(self) -> Iterator[None]:
        lock = _lock(self._part)
        if lock is None:
            self._part = self._part.with_name(f"{self._path.name}.{uuid4().hex[:_OWN_DIGITS]}.part")
        try:
            yield
        except BaseException:
            if lock is None or not self._have():
                self._part.unlink(missing_ok=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)

    async def _fetch(self) -> None:
        resumed = await asyncio.to_thread(self._have) > 0
        await self._fill()
        if not await asyncio.to_thread(self._is_right, self._part) and resumed:
            # The part from an earlier call may have been another file's.
            self._empty()
            await self._fill()
        if not await asyncio.to_thread(self._is_right, self._part):
            self._empty()
            raise DownloadFailed(
                f"{self._file.uri} does not have the SHA-256 of its event: somebody changed it, or its worker's "
                "storage is broken; nothing was kept"
            )
        await asyncio.to_thread(os.replace, self._part, self._path)

    async def _fill(self) -> None:
        """Fetch the missing bytes of the part file."""
        waits = backoff(0.2, 5)
        without_bytes = 0
        while (have := await asyncio.to_thread(self._have)) < self._file.bytes or not self._part.exists():
            try:
                await self._get_from(have)
            except (_RetryDownload, *NETWORK_ERRORS) as error:
                without_bytes = 0 if await asyncio.to_thread(self._have) > have else without_bytes + 1
                text = str(error) or type(error).__name__
                if without_bytes == TRIES:
                    raise DownloadFailed(f"{self._file.uri}: {text}; gave up after {TRIES} tries") from error
                _log.warning("download of %s interrupted: %s; trying again", self._file.uri, text)
                await asyncio.sleep(next(waits))

    async def _get_from(self, offset: int) -> None:
        """Get the bytes from ``offset`` on, with this program's own keys where it has any: a URL may have expired."""
        if self._results is None:
            await self._get_url(offset)
            return
        try:
            async with self._results.open(self._file.uri, ByteRange(offset, self._file.bytes - 1)) as stream:
                if stream.size > self._file.bytes:
                    raise self._too_large()
                await self._write(offset, stream)
        except StorageUnavailable as error:
            if self._file.url is None:
                raise DownloadFailed(str(error)) from error
            self._results = None
            await self._get_url(await asyncio.to_thread(self._have))

    async def _get_url(self, offset: int) -> None:
        if self._file.url is None:
            raise DownloadFailed(
                f"{self._file.uri}: this client has no access to storage and the event has no URL; give Client its "
                "storage, or set ACESTEP_S3_PRESIGN_SECONDS for the workers"
            )
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._session.get(self._file.url, headers=headers) as answer:
            self._check_status(answer.status)
            await self._write(offset if answer.status == _PARTIAL else 0, answer.content.iter_chunked(_CHUNK_BYTES))

    async def _write(self, offset: int, chunks: AsyncIterable[bytes]) -> None:
        left = self._file.bytes - offset
        with self._part.open("ab" if offset else "wb") as file:
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    self._empty()
                    raise self._too_large()
                await asyncio.to_thread(file.write, chunk)
        if left > 0:
            raise _RetryDownload("the answer ended early")

    def _too_large(self) -> DownloadFailed:
        return DownloadFailed(f"{self._file.uri} is larger than its event says: {self._file.bytes:,} bytes")

    def _check_status(self, status: int) -> None:
        if status in {_OK, _PARTIAL}:
            return
        if status == _UNSATISFIABLE:  # the object is shorter than the part, which is another object's then
            self._empty()
        if status in {_FORBIDDEN, _NOT_FOUND}:
            hint = {_FORBIDDEN: "the URL has expired, or these keys may not read it", _NOT_FOUND: "it is gone"}[status]
            raise DownloadFailed(f"{self._file.uri}: HTTP {status}: {hint}")
        raise _RetryDownload(f"HTTP {status}")

    def _empty(self) -> None:
        os.truncate(self._part, 0)  # not deleted: the lock is on it

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _is_right(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self._file.bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._file.sha256


def _lock(path: Path) -> int | None:
    """Return a descriptor that locks a file, made where it is missing, until it is closed; None: it is locked."""
    if sys.platform == "win32":  # which has other locks, and renames no file that is open
        path.touch()
        return os.open(os.devnull, os.O_RDONLY)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_at_once(descriptor)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # it was renamed between the two calls: its download is complete


def _lock_at_once(descriptor: int) -> None:
    import fcntl  # noqa: PLC0415 - not there on Windows, where programs that subscribe may run too

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        _log.debug("no lock on a download: %s", error)  # as on some network file systems


def _name(job: Completed, audio: Audio) -> str:
    """Return the file's name; an event must not name a place outside the folder."""
    name = f"{job.task_id}-{PurePosixPath(audio.uri).name}"
    if not _NAME.fullmatch(name):
        raise DownloadFailed(f"{audio.uri}: {name!r} is not a valid file name")
    return name
