# SPDX-License-Identifier: Apache-2.0
"""Places of models: their folders, and the cache of the Hugging Face client, without importing the client."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TRUE: Final = {"1", "on", "yes", "true"}


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids downloads."""
    return environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE


def model_folders(named: str, checkpoint_dir: Path | None) -> tuple[Path, ...]:
    """Return where a model of that name may lie: at that path, then in the folder of models."""
    given = Path(named).expanduser()
    return (given,) if checkpoint_dir is None else (given, checkpoint_dir / named)


def snapshot(hub_id: str, environ: Mapping[str, str]) -> Path | None:
    """Return the newest snapshot of a repository; None: it was not downloaded."""
    root = _cache(environ) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return max(_folders(root), key=os.path.getmtime, default=None)


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in root.iterdir() if path.is_dir())


def _cache(environ: Mapping[str, str]) -> Path:
    """Return the cache folder, from the same variables as the Hugging Face client."""
    if given := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"
