# SPDX-License-Identifier: Apache-2.0
"""LoRAs on this machine: the operator's, by name, and copies of those that requests fetched, for the next request.

Files are looked at here and nothing is read from them: what is in them is the renderer's business.
"""

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from acestep_consumer.concurrency.locks import KeyedLock
from acestep_consumer.domain.errors import InputNotAllowed, InputUnreadable
from acestep_schemas.coerce import LORA_NAME, LORA_SUFFIX

Fetch = Callable[[Path], Awaitable[None]]
"""Writes the files of one LoRA into a folder, or raises."""

# As PEFT, and with it ACE-Step's trainer, writes them: the weights, and beside them what they are to be scaled by.
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
PEFT_CONFIG: Final = "adapter_config.json"
# As diffusers writes them.
DIFFUSERS_WEIGHTS: Final = "pytorch_lora_weights.safetensors"

_FOLDER: Final = "loras"
_CACHE: Final = ".loras"  # no task id starts with a dot


class LoraFolder:
    """The LoRAs in ``loras/`` of the checkpoint folder.

    Args:
        checkpoint_dir: None: there is no such folder, and every name is refused.
        max_bytes: larger files are refused.
    """

    def __init__(self, checkpoint_dir: Path | None, max_bytes: int) -> None:
        self._root = checkpoint_dir / _FOLDER if checkpoint_dir else None
        self._max_bytes = max_bytes

    def find(self, name: str) -> Path:
        """Return the weights of ``name``: a file of that name, with or without its ending, or the file in a folder.

        Raises:
            InputNotAllowed: it is no plain name, leads out of the folder, or this worker has no such folder.
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
    yield root / name / DIFFUSERS_WEIGHTS


class LoraCache:
    """Fetched LoRAs, each in a folder of its own beside the jobs' folders; the least recently used one leaves.

    A job gets hard links, so that what leaves here stays with the jobs that still need it.

    Args:
        most: how many to keep.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._kept: OrderedDict[str, Path] = OrderedDict()
        self._turns = KeyedLock()

    async def give(self, key: str, target: Path, fetch: Fetch) -> None:
        """Make the folder ``target`` with the LoRA that ``key`` names; ``fetch`` is called when it is not here.

        ``target`` lies in a job's folder. Jobs that ask for one key at the same time wait for one fetch.
        """
        async with self._turns.of(key):
            if key not in self._kept:
                self._kept[key] = await _fetched(target.parent.parent / _CACHE, fetch)
            self._kept.move_to_end(key)
            shutil.copytree(self._kept[key], target, copy_function=_link)
        await self._shrink()

    async def _shrink(self) -> None:
        """Remove what is too many. Its turn is awaited: somebody may be taking links right now."""
        while len(self._kept) > self._most:
            key, folder = self._kept.popitem(last=False)
            async with self._turns.of(key):
                shutil.rmtree(folder, ignore_errors=True)


async def _fetched(cache: Path, fetch: Fetch) -> Path:
    """Fetch into a new folder: files are never written a second time, for jobs may hold links to them."""
    folder = _new_folder(cache)
    try:
        await fetch(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _new_folder(cache: Path) -> Path:
    cache.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
