# SPDX-License-Identifier: Apache-2.0
"""LoRA files on this machine: the operator's, by name, and a cache of those that were fetched for requests.

Files are found and linked here, never parsed: their content is the renderer's business.
"""

import asyncio
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self, TypeVar

from acestep_consumer.concurrency.locks import KeyedLock
from acestep_consumer.domain.errors import InputNotAllowed, InputUnreadable
from acestep_schemas.coerce import LORA_NAME, LORA_SUFFIX

Fetch = Callable[[Path], Awaitable[None]]
"""Writes the files of one LoRA into a folder, or raises."""

# As PEFT, and with it ACE-Step's trainer, writes them: the weights, and a file that has their scale.
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
PEFT_CONFIG: Final = "adapter_config.json"
# As diffusers writes them, and ACE-Step's second trainer.
DIFFUSERS_WEIGHTS: Final = "pytorch_lora_weights.safetensors"
LOKR_WEIGHTS: Final = "lokr_weights.safetensors"

T = TypeVar("T")

_FOLDER: Final = "loras"
_CACHE: Final = ".loras"  # no task id starts with a dot


class LoraFolder:
    """The LoRAs in ``loras/`` of the checkpoint folder.

    Args:
        checkpoint_dir: None: there is none, and every name is refused.
        max_bytes: larger files are refused.
    """

    def __init__(self, checkpoint_dir: Path | None, max_bytes: int) -> None:
        self._root = checkpoint_dir / _FOLDER if checkpoint_dir else None
        self._max_bytes = max_bytes

    def find(self, name: str) -> Path:
        """Return the weights of ``name``: a file of that name, with or without its suffix, or the file in a folder.

        Raises:
            InputNotAllowed: it is not a plain name, leads out of the folder, or this worker has no such folder.
            InputUnreadable: there is no such LoRA, or it is too large.
        """
        if self._root is None:
            raise InputNotAllowed(
                "this worker has no checkpoint folder (ACESTEP_CHECKPOINT_DIR); name s3://bucket/key.safetensors"
            )
        if not LORA_NAME.fullmatch(name):
            raise InputNotAllowed("neither the name of a LoRA nor s3://bucket/key.safetensors")
        try:
            return self._find(self._root, name)
        except OSError as error:
            raise InputUnreadable(f"cannot be read ({type(error).__name__})") from error

    def _find(self, root: Path, name: str) -> Path:
        for path in _candidates(root, name):
            if path.is_file():
                if not path.resolve().is_relative_to(root.resolve()):
                    raise InputNotAllowed(f"a link that leads out of the folder {_FOLDER} of the worker's checkpoints")
                if path.stat().st_size > self._max_bytes:
                    raise InputUnreadable(f"more than {self._max_bytes:,} bytes (ACESTEP_LORA_MAX_BYTES)")
                return path
        raise InputUnreadable(
            f"not found; the folder {_FOLDER} of the worker's checkpoints has neither {name.removesuffix(LORA_SUFFIX)}"
            f"{LORA_SUFFIX} nor {name}/{PEFT_WEIGHTS}"
        )


def _candidates(root: Path, name: str) -> Iterator[Path]:
    yield root / (name.removesuffix(LORA_SUFFIX) + LORA_SUFFIX)
    yield root / name / PEFT_WEIGHTS
    yield root / name / "adapter" / PEFT_WEIGHTS  # a folder as ACE-Step's trainer leaves it
    yield root / name / DIFFUSERS_WEIGHTS
    yield root / name / LOKR_WEIGHTS


@dataclass(frozen=True, slots=True)
class _CachedLora:
    """A fetched LoRA: its folder, and the names of the files in it."""

    folder: Path
    names: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Take what is in the folder. Blocks."""
        return cls(folder, tuple(path.name for path in folder.iterdir()))

    def is_whole(self) -> bool:
        """Whether all of it is still there: a cleaner of temporary folders may have been here."""
        return all((self.folder / name).is_file() for name in self.names)

    def copy_to(self, target: Path) -> None:
        """Create the folder ``target`` with links to the files, or copies. Blocks. Raises ``OSError``."""
        # Not shutil.copytree: its own error hides that the disk is full.
        target.mkdir(parents=True)
        for name in self.names:
            _link(self.folder / name, target / name)

    def remove(self) -> None:
        """Blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)


class LoraCache:
    """LRU cache of fetched LoRAs, each in a folder of its own beside the jobs' folders.

    Jobs get hard links, so that a LoRA that is evicted stays with the jobs that still need it.

    Args:
        size: LoRAs to keep.
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._cached: OrderedDict[str, _CachedLora] = OrderedDict()
        self._locks = KeyedLock()

    async def provide(self, key: str, target: Path, fetch: Fetch) -> None:
        """Create the folder ``target`` with the LoRA of ``key``; ``fetch`` is called unless it is cached.

        ``target`` is in a job's folder. Jobs that need one key at the same time wait for one fetch.
        """
        async with self._locks.of(key):
            cached = self._cached.get(key)
            if cached is None or not await _to_its_end(cached.is_whole):
                self._cached[key] = cached = await _fetched(target.parent.parent / _CACHE, fetch)
            self._cached.move_to_end(key)
            # Where there are no hard links, it is a copy of a gigabyte.
            await _to_its_end(partial(cached.copy_to, target))
        await self._evict()

    async def _evict(self) -> None:
        """Remove the least recently used LoRAs, under their locks: a job may be linking the files."""
        while len(self._cached) > self._size:
            key, cached = self._cached.popitem(last=False)
            async with self._locks.of(key):
                await _to_its_end(cached.remove)


async def _fetched(cache: Path, fetch: Fetch) -> _CachedLora:
    """Fetch into a new folder: a file is never overwritten, because jobs may have links to it."""
    folder = await _to_its_end(partial(_new_folder, cache))
    try:
        await fetch(folder)
        return await _to_its_end(partial(_CachedLora.of, folder))
    except BaseException:
        await _to_its_end(partial(shutil.rmtree, folder, ignore_errors=True))
        raise


def _new_folder(cache: Path) -> Path:
    cache.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache))


async def _to_its_end(call: Callable[[], T]) -> T:
    """Run file work in a thread. A cancellation is raised when it has ended, so that nothing writes on behind it."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
