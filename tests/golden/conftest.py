# SPDX-License-Identifier: Apache-2.0
"""The worker of the golden cases, with its models: one for all files of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.golden.golden_worker import GoldenWorker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> GoldenWorker:
    """Renders golden cases."""
    from tests.golden.golden_worker import GoldenWorker  # noqa: PLC0415 - imports torch, which other files do without

    return GoldenWorker(tmp_path_factory.mktemp("golden"))
