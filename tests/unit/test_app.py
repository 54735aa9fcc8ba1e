# SPDX-License-Identifier: Apache-2.0
"""Exit codes of a worker whose start breaks; the settings that do it are in tests/faults/test_start_errors.py."""

import json
from contextlib import AsyncExitStack

import pytest

from acestep_consumer.app import Worker, run_worker
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import load
from acestep_consumer.domain.errors import StorageMisconfigured, StorageRefused, StorageUnavailable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("nobody foresaw\nthis"), Exit.UNEXPECTED),
        (RecursionError("too deep"), Exit.UNEXPECTED),
        (StorageUnavailable("s3://b: ConnectionError"), Exit.UNREACHABLE),
        (StorageRefused("s3://b", "AccessDenied"), Exit.USAGE),
        (StorageMisconfigured("no keys"), Exit.USAGE),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_whatever_breaks_the_start_is_one_line_and_a_documented_exit_code(
    error: Exception, code: Exit, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def prepare(_self: Worker, _stack: AsyncExitStack) -> None:
        raise error

    monkeypatch.setattr(Worker, "_prepare", prepare)
    settings = load({"ACESTEP_LOG_FORMAT": "json", "ACESTEP_HTTP_PORT": "0"}, None)
    assert await run_worker(settings, grace_s=1) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "cannot start"
    assert json.loads(line)["level"] == "error"
