# SPDX-License-Identifier: Apache-2.0
"""Cache of the Hugging Face client: finds what was downloaded, without importing the client."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_TRUE: Final = {"1", "on", "yes", "true"}


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids downloads."""
    return environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE


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
