# SPDX-License-Identifier: Apache-2.0
"""Golden cases on disk: requests, and the numbers and texts that the original ACE-Step 1.5 makes of them.

A file lies here, or, where it is too large to be committed, in ``../shared/golden`` beside the repository.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
WITHOUT_SONGS = ("lm", "parse", "align", "extract-codes")


@dataclass(frozen=True)
class GoldenCase:
    """One case. ``facts`` is its JSON; the arrays are those of its ``.npz`` file."""

    name: str
    facts: dict[str, Any]

    @property
    def kind(self) -> str:
        """The kind, such as ``cover``; see ``../shared/golden/KINDS.json``."""
        kind: str = self.facts["kind"]
        return kind

    @property
    def model(self) -> str:
        """The folder of the DiT."""
        model: str = self.facts["model"]
        return model

    @cached_property
    def arrays(self) -> dict[str, torch.Tensor]:
        """The case's arrays by name."""
        with np.load(need(f"cases/{self.name}.npz")) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def find(relative: str) -> Path | None:
    """Return the file or folder of that name, relative to the golden folder; None: it is not on this machine."""
    return next((path for folder in (HERE, SHARED) if (path := folder / relative).exists()), None)


def need(relative: str) -> Path:
    """Return the file or folder of that name, and skip the test where it is missing."""
    found = find(relative)
    if found is None:
        pytest.skip(f"{relative} is neither in tests/golden nor in ../shared/golden")
    return found


def cases(wanted: Callable[[str], bool]) -> list[GoldenCase]:
    """Return the cases of the kinds that are ``wanted``, by name."""
    paths = sorted((HERE / "cases").glob("*.json"))
    found = (GoldenCase(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths)
    return [case for case in found if wanted(case.kind)]


def songs() -> list[GoldenCase]:
    """Return all cases that end in songs."""
    return cases(lambda kind: kind not in WITHOUT_SONGS)
