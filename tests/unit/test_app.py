# SPDX-License-Identifier: Apache-2.0
"""Exit codes of a worker whose start breaks; the settings that do it are in tests/faults/test_start_errors.py."""

from contextlib import AsyncExitStack

import pytest
from structlog.testing import capture_logs

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
    error: Exception, code: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prepare(_self: Worker, _stack: AsyncExitStack) -> None:
        raise error

    monkeypatch.setattr(Worker, "_prepare", prepare)
    monkeypatch.setattr("acestep_consumer.app.check_checkpoints", lambda _: None)  # there are no models here
    monkeypatch.setattr("acestep_consumer.app.set_up_logs", lambda *_: True)  # the log is the test's
    with capture_logs() as logs:
        assert await run_worker(load({}, None), grace_s=1) == code
    (line,) = [entry for entry in logs if entry["log_level"] != "debug"]
    assert (line["event"], line["log_level"]) == ("cannot start", "error")
    assert "\n" not in line["reason"]
    assert "exc_info" not in line
