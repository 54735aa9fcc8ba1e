# SPDX-License-Identifier: Apache-2.0
"""Settings that are read again: what holds at once, what waits for a restart, and what changes nothing at all."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from acestep_consumer.config import settings
from acestep_consumer.config.logs import set_log_level
from acestep_consumer.config.settings import SECTIONS, Settings, SettingsError
from acestep_consumer.worker.reload import RELOADABLE, Reloader, compare


def load(**variables: str) -> Settings:
    return settings.load(environ=variables, env_file=None)


def test_every_reloadable_field_is_a_setting() -> None:
    assert {(section, field) for section, fields in RELOADABLE.items() for field in fields} <= {
        (name, field) for name, section in SECTIONS.items() for field in section.model_fields
    }


def test_what_can_change_holds_and_what_cannot_stays_as_it_was() -> None:
    now = {"ACESTEP_QUEUE_WORKERS": "auto", "ACESTEP_LOG_LEVEL": "debug"}
    change = compare(load(), load(**now, ACESTEP_S3_BUCKET="other", ACESTEP_DEVICE="cpu"))
    assert change.changed == ("ACESTEP_QUEUE_WORKERS", "ACESTEP_LOG_LEVEL")
    assert change.waiting == ("ACESTEP_S3_BUCKET", "ACESTEP_DEVICE")
    assert change.settings == load(**now)


def test_nothing_changes_when_nothing_is_different() -> None:
    change = compare(load(), load())
    assert (change.settings, change.changed, change.waiting) == (load(), (), ())


class Bench:
    """A reloader, the settings that it finds next, and those that were applied."""

    def __init__(self) -> None:
        self.next: Settings | Exception = load()
        self.applied: list[Settings] = []
        self.refuses = False
        self.reloader = Reloader(self.read, load(), self.apply)

    def read(self) -> Settings:
        if isinstance(self.next, Exception):
            raise self.next
        return self.next

    async def apply(self, found: Settings) -> None:
        if self.refuses:
            raise SettingsError("ACESTEP_INPUT_HOSTS: no")
        self.applied.append(found)

    async def reload(self) -> list[tuple[str, str]]:
        """What is logged: level and text."""
        with capture_logs() as logs:
            await self.reloader.reload()
        return [(line["log_level"], line["event"]) for line in logs]


async def test_what_needs_a_restart_is_named_again_until_there_was_one() -> None:
    bench = Bench()
    bench.next = load(ACESTEP_DEVICE="cpu")
    for _ in range(2):
        assert await bench.reload() == [("info", "settings reloaded"), ("warning", "needs a restart")]


@pytest.mark.parametrize(
    "error", [SettingsError("no"), PermissionError("no"), UnicodeDecodeError("utf-8", b"", 0, 1, "")]
)
async def test_settings_that_cannot_be_read_change_nothing(error: Exception) -> None:
    bench = Bench()
    bench.next = error
    assert await bench.reload() == [("error", "settings not reloaded, nothing changed")]
    assert bench.applied == []


async def test_settings_that_their_user_refuses_are_tried_again_next_time() -> None:
    bench = Bench()
    bench.next, bench.refuses = load(ACESTEP_INPUT_HOSTS="ok.example"), True
    assert await bench.reload() == [("error", "settings not reloaded, nothing changed")]
    bench.refuses = False
    with capture_logs() as logs:
        await bench.reloader.reload()
    assert logs[0]["changed"] == ["ACESTEP_INPUT_HOSTS"]


async def test_a_bug_is_logged_and_the_next_reload_is_served() -> None:
    bench = Bench()
    bench.next = ValueError("bug")
    assert await bench.reload() == [("error", "settings not reloaded")]
    bench.next = load(ACESTEP_QUEUE_WORKERS="3")
    await bench.reload()
    assert [found.broker.queue_workers for found in bench.applied] == [3]


def test_a_line_of_env_that_cannot_be_read_is_an_error_and_not_a_default(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ACESTEP_QUEUE_WORKERS=4\n# fine\nthis is = not ' a line\n")
    with pytest.raises(SettingsError, match="line 3"):
        settings.load(environ={}, env_file=file)


def test_the_lowest_level_changes_for_loggers_that_were_used_before(capfd: pytest.CaptureFixture[str]) -> None:
    import structlog  # noqa: PLC0415 - beside its one use

    from acestep_consumer.config.logs import set_up_logs  # noqa: PLC0415 - as above

    try:
        set_up_logs("info", "json")
        log = structlog.get_logger()
        log.info("first")
        set_log_level("error")
        log.info("second")
        set_log_level("debug")
        log.debug("third")
    finally:
        structlog.reset_defaults()
    shown = capfd.readouterr().err
    assert "first" in shown
    assert "second" not in shown
    assert "third" in shown
