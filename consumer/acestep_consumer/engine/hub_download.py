# SPDX-License-Identifier: Apache-2.0
"""Downloads of the hub's files that go on where they were interrupted, checked by size and hash.

The Hugging Face client gives the list of files, the headers (token) and the transfer. Its own ``hf_hub_download``
removes what it has when it is interrupted, so that a cut connection costs gigabytes: the files here stay.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, and missing in its __all__
    build_hf_headers,
    disable_progress_bars,
)

from acestep_consumer.engine.published_models import PublishedModel

# No code of a checkpoint is run, so none is downloaded.
_SUFFIXES: Final = (".json", ".safetensors", ".pt", ".txt", ".jinja", ".model")
_NETWORK: Final = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
_UNAUTHORIZED: Final = (401, 403)
_NOT_FOUND: Final = 404
_BLOCK: Final = 1 << 20

Advance = Callable[[int], None]


class HubUnreachable(Exception):
    """The hub did not answer, or refused; the text says why and what to do."""


class ModelNotStored(Exception):
    """A file cannot be stored here, or is not the published one; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a model: its name below the model's folder, bytes, and hash as the hub has it.

    ``sha256`` is that of a large file; a small one has git's ``blob_id``.
    """

    model: PublishedModel
    name: str
    bytes: int
    sha256: str | None
    blob_id: str | None
    revision: str

    def path(self, checkpoints: Path) -> Path:
        """Return its place in a folder of checkpoints."""
        return checkpoints / self.model.name / self.name

    def partial(self, checkpoints: Path) -> Path:
        """Return the place of what has been downloaded of it. Another version has another one."""
        path = self.path(checkpoints)
        return path.with_name(f"{path.name}.{(self.sha256 or self.blob_id or self.revision)[:8]}.incomplete")

    def matches(self, path: Path, advance: Advance = lambda _: None) -> bool:
        """Whether a file has its size and hash. ``advance`` gets the bytes that were read."""
        if path.stat().st_size != self.bytes:
            return False
        if self.sha256 is None and self.blob_id is None:
            return True
        git = f"blob {self.bytes}\0".encode()
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(git, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
        return digest.hexdigest() == (self.sha256 or self.blob_id)


def hub_files(models: Sequence[PublishedModel]) -> tuple[HubFile, ...]:
    """Return the files of these models, asked from the hub: one request for each repository.

    Raises:
        HubUnreachable: it cannot be asked, or does not have one of them.
    """
    repositories = dict.fromkeys(model.repository for model in models)
    return tuple(
        file
        for repository in repositories
        for file in _files_of(repository, [model for model in models if model.repository == repository])
    )


def _files_of(repository: str, models: Sequence[PublishedModel]) -> Iterator[HubFile]:
    with _errors_as_ours(repository):
        info = HfApi().model_info(repository, files_metadata=True)
    for model in models:
        found = [
            HubFile(
                model=model,
                name=each.rfilename.removeprefix(model.prefix),
                bytes=each.size or 0,
                sha256=each.lfs.sha256 if each.lfs else None,
                blob_id=each.blob_id,
                revision=str(info.sha),
            )
            for each in info.siblings or ()
            if each.rfilename.startswith(model.prefix) and each.rfilename.endswith(_SUFFIXES)
        ]
        if not any(file.name == "config.json" for file in found):
            raise HubUnreachable(f"{repository} on {constants.ENDPOINT} does not hold {model.name}")
        yield from (file for file in found if model.prefix or "/" not in file.name)


@contextmanager
def only_pull(checkpoints: Path) -> Iterator[None]:
    """Make the folder, and keep other downloads out of it.

    Raises:
        ModelNotStored: it cannot be written, or another one is running.
    """
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = (checkpoints / ".pull.lock").open("wb")
    except OSError as error:
        raise ModelNotStored(f"{checkpoints} cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ModelNotStored(f"another download into {checkpoints} is running: wait for it to end") from error
        yield


def check_room(files: Sequence[HubFile], checkpoints: Path) -> None:
    """Check that the disk has room for what is missing.

    Raises:
        ModelNotStored: it has not; nothing was downloaded.
    """
    missing = sum(file.bytes - stored_bytes(file, checkpoints) for file in files)
    free = shutil.disk_usage(checkpoints).free
    if missing > free:
        raise ModelNotStored(
            f"{checkpoints} has {free / 1e9:,.1f} GB free, and {missing / 1e9:,.1f} GB are to be downloaded: "
            "make room, or name another folder with --checkpoints"
        )


def stored_bytes(file: HubFile, checkpoints: Path) -> int:
    """Return how many bytes of a file are there, in full or in part."""
    places = (file.path(checkpoints), file.partial(checkpoints))
    return min(max((place.stat().st_size for place in places if place.is_file()), default=0), file.bytes)


def fetch(file: HubFile, checkpoints: Path, advance: Advance) -> None:
    """Download one file, or the rest of it, and put it in its place once its hash is right.

    ``advance`` gets the bytes as they arrive, and a negative number where some are thrown away.

    Raises:
        HubUnreachable: the transfer failed; what has arrived stays.
        ModelNotStored: the disk is full, or the file is not the published one.
    """
    target, partial = file.path(checkpoints), file.partial(checkpoints)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # what was left by an interruption may be damaged: then once more from the beginning
            _transfer(file, partial, advance)
            if file.matches(partial):
                partial.replace(target)
                return
            advance(-partial.stat().st_size)
            partial.unlink()
    except OSError as error:
        raise ModelNotStored(f"{target} cannot be written: {error.strerror or error}") from error
    raise ModelNotStored(f"{file.model.name}/{file.name} arrived with another hash than the hub names, twice")


def _transfer(file: HubFile, partial: Path, advance: Advance) -> None:
    url = hf_hub_url(file.model.repository, file.model.prefix + file.name, revision=file.revision)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    disable_progress_bars()
    with partial.open("ab") as plain, _errors_as_ours(file.model.repository):
        counted = cast("BinaryIO", _CountedFile(plain, advance))
        http_get(url, counted, resume_size=plain.tell(), headers=headers, expected_size=file.bytes)


class _CountedFile:
    """A file that reports how many bytes are written to it, and how many are cut off."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self._file = file
        self._advance = advance

    def write(self, block: bytes) -> int:
        self._advance(len(block))
        return self._file.write(block)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def truncate(self) -> int:
        kept = self._file.tell()
        self._advance(kept - self._file.seek(0, 2))
        return self._file.truncate(kept)


@contextmanager
def _errors_as_ours(repository: str) -> Iterator[None]:
    """Raise the client's errors as ``HubUnreachable``, with what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        raise HubUnreachable(_refusal(repository, error)) from error
    except Exception as error:
        # An OSError without a number is the client's own, of a transfer that ended early.
        cut = isinstance(error, OSError) and error.errno is None
        if not cut and type(error).__module__.partition(".")[0] not in _NETWORK:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubUnreachable(
            f"{constants.ENDPOINT} cannot be read ({reason}): check the network or HF_ENDPOINT, and try again; "
            "what has arrived is kept"
        ) from error


def _refusal(repository: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if status in _UNAUTHORIZED:
        return f"{constants.ENDPOINT} refused {repository} ({status}): set HF_TOKEN to a token that may read it"
    if status == _NOT_FOUND:
        return f"{constants.ENDPOINT} has no repository {repository}; is HF_ENDPOINT right?"
    return f"{constants.ENDPOINT} answered {status} for {repository}: try again later"
