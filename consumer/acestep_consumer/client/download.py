# SPDX-License-Identifier: Apache-2.0
"""Songs to files: each whole, checked and in place, or not there."""

import asyncio
import hashlib
import logging
import os
import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Final

import aiohttp

from acestep_consumer.broker.backoff import backoff
from acestep_consumer.client.errors import DownloadFailed
from acestep_schemas.events import Audio, Completed

Link = Callable[[Audio], Awaitable[str]]
"""Gives a URL that the song can be read from; asked anew for each try, since links expire."""

CONNECT_S, READ_S = 10.0, 30.0
# Tries in a row that brought not a single byte.
TRIES: Final = 5
AT_ONCE: Final = 4

_CHUNK_BYTES: Final = 1 << 20
_OK, _PARTIAL, _FORBIDDEN, _NOT_FOUND, _UNSATISFIABLE = 200, 206, 403, 404, 416
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}")
_log: Final = logging.getLogger("acestep_consumer.client")


class _RetryDownload(Exception):
    """This try failed; the next one may not."""


async def download(job: Completed, folder: Path, link: Link) -> tuple[Path, ...]:
    """Write the songs of a job to ``folder`` (made when missing) as ``<task id>-<index>.<ending>``.

    A song that is there already is left alone. What an earlier call left half done is gone on with.

    Raises:
        DownloadFailed: a song cannot be had, or differs from its event in size or SHA-256.
    """
    paths = [folder / _name(job, audio) for audio in job.audios]
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    few = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=_trust()),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S),
        auto_decompress=False,
        trust_env=True,
    ) as session:

        async def fetch(audio: Audio, path: Path) -> None:
            async with few:
                await _Download(session, audio, path, link).run()

        tasks = [asyncio.ensure_future(fetch(*song)) for song in zip(job.audios, paths, strict=True)]
        try:
            await asyncio.gather(*tasks)
        finally:  # the first failure ends the others; their beginnings stay for the next call
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(paths)


class _Download:
    """One song. The bytes go to ``<name>.part`` beside its place, and move there when they are all right."""

    def __init__(self, session: aiohttp.ClientSession, audio: Audio, path: Path, link: Link) -> None:
        self._session = session
        self._audio = audio
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._link = link

    async def run(self) -> None:
        if await asyncio.to_thread(self._is_right, self._path):
            return
        resumed = await asyncio.to_thread(self._have) > 0
        await self._fill()
        if not await asyncio.to_thread(self._is_right, self._part) and resumed:
            # The beginning, from an earlier call, may have been another file's.
            self._part.unlink()
            await self._fill()
        if not await asyncio.to_thread(self._is_right, self._part):
            self._part.unlink()
            raise DownloadFailed(
                f"{self._audio.uri} has not the SHA-256 that its event names: somebody changed it, or its worker's "
                "storage is broken; nothing was kept"
            )
        await asyncio.to_thread(os.replace, self._part, self._path)

    async def _fill(self) -> None:
        """Get what is missing of the part file."""
        waits = backoff(0.2, 5)
        futile = 0
        while (have := await asyncio.to_thread(self._have)) < self._audio.bytes or not self._part.exists():
            try:
                await self._get_from(have)
            except (_RetryDownload, aiohttp.ClientError, TimeoutError) as error:
                futile = 0 if await asyncio.to_thread(self._have) > have else futile + 1
                text = str(error) or type(error).__name__
                if futile == TRIES:
                    raise DownloadFailed(f"{self._audio.uri}: {text}; gave up after {TRIES} tries") from error
                _log.warning("download of %s interrupted: %s; trying again", self._audio.uri, text)
                await asyncio.sleep(next(waits))

    async def _get_from(self, offset: int) -> None:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._session.get(await self._link(self._audio), headers=headers) as answer:
            self._judge(answer.status)
            with self._part.open("ab" if answer.status == _PARTIAL else "wb") as file:
                room = self._audio.bytes - (offset if answer.status == _PARTIAL else 0)
                async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                    room -= len(chunk)
                    if room < 0:
                        self._part.unlink()
                        raise DownloadFailed(f"{self._audio.uri} is larger than the {self._audio.bytes:,} bytes named")
                    await asyncio.to_thread(file.write, chunk)
        if room > 0:
            raise _RetryDownload("the answer ended early")

    def _judge(self, status: int) -> None:
        if status in {_OK, _PARTIAL}:
            return
        if status == _UNSATISFIABLE:  # the object is shorter than what lies here: it is another one
            self._part.unlink()
        if status in {_FORBIDDEN, _NOT_FOUND}:
            hint = {_FORBIDDEN: "the link has expired, or these keys may not read it", _NOT_FOUND: "it is gone"}[status]
            raise DownloadFailed(f"{self._audio.uri}: HTTP {status}: {hint}")
        raise _RetryDownload(f"HTTP {status}")

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _is_right(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self._audio.bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._audio.sha256


def _name(job: Completed, audio: Audio) -> str:
    """The file's name; an event must not choose a place outside the folder."""
    name = f"{job.task_id}-{PurePosixPath(audio.uri).name}"
    if not _NAME.fullmatch(name):
        raise DownloadFailed(f"{audio.uri}: {name!r} is no name for a file")
    return name


def _trust() -> ssl.SSLContext | bool:
    """The authorities that S3 calls trust as well."""
    bundle = os.environ.get("AWS_CA_BUNDLE")
    return ssl.create_default_context(cafile=bundle) if bundle else True
