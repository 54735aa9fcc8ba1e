# SPDX-License-Identifier: Apache-2.0
"""An engine process that grows past its limit is killed and replaced, and its jobs are done by the next one."""

from pathlib import Path

import pytest

from tests.support.engines import render, supervised


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acestep_consumer.engine.supervisor.FIRST_RESTART_S", 0.01)


async def test_a_process_that_grows_past_its_limit_is_replaced(tmp_path: Path) -> None:
    async with supervised(ram_bytes=200 << 20) as engine:
        rendering = await render(engine, tmp_path, f"swell-once {tmp_path / 'mark'} 300")
        assert rendering.tracks
        assert engine.restarts == 1
