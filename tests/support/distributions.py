# SPDX-License-Identifier: Apache-2.0
"""The packages that an installation brings, as the metadata of this environment says."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def with_requirements(*names: str) -> set[str]:
    """Return distributions and all that they require, by their normalised names; extras are left out."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = _normalised(todo.pop())
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue  # for another Python or another system
        found.add(name)
        todo += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line]
    return found


def distribution_of(module: str) -> set[str]:
    """Return the distributions that a top-level module may come from."""
    return {_normalised(name) for name in _by_module().get(module, ())}


def link(names: set[str], folder: Path) -> None:
    """Make these distributions importable from ``folder``, and no others: links to what each one installed."""
    folder.mkdir()
    for name in names:
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}
        for top in tops:
            (folder / top).symlink_to(str(distribution.locate_file(top)))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _by_module() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()
