# SPDX-License-Identifier: Apache-2.0
"""Reload of settings on SIGHUP: applies those that may change while jobs run.

All or nothing: invalid settings change nothing. Settings that need a restart keep their value and are named in the log.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from acestep_consumer.config.settings import SECTIONS, Section, Settings, SettingsError, variable_of

RELOADABLE: Final[Mapping[str, frozenset[str]]] = {
    "broker": frozenset({"queue_workers", "queue_workers_max"}),
    "storage": frozenset({"presign_s"}),
    "inputs": frozenset({"buckets", "hosts", "networks", "results", "max_bytes", "lora_max_bytes", "timeout_s"}),
    "engine": frozenset({"scratch_min_gb"}),
    "worker": frozenset(
        {"log_level", "execution_timeout_s", "strict_requests", "default_batch_size", "default_format"}
    ),
}
"""By section, the fields that may change while jobs run."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """Difference between the running settings and those just read.

    Attributes:
        settings: the running settings with the reloadable ones replaced.
        changed: variables that take effect now.
        waiting: variables that need a restart.
    """

    settings: Settings
    changed: tuple[str, ...]
    waiting: tuple[str, ...]


Apply = Callable[[Settings], Awaitable[None]]
"""Apply settings. Raises ``SettingsError`` for a value that cannot be used; nothing is changed then."""


def compare(running: Settings, found: Settings) -> SettingsChange:
    """Compare two sets of settings. Pure."""
    sections, changed, waiting = {}, [], []
    for name in SECTIONS:
        fields = RELOADABLE.get(name, frozenset())
        old, new = _section(running, name), _section(found, name)
        differing = set(_differing(old, new))
        now = differing & fields
        sections[name] = old.model_copy(update={field: getattr(new, field) for field in now})
        changed += _variables(old, now)
        waiting += _variables(old, differing - fields)
    return SettingsChange(running.model_copy(update=sections), tuple(changed), tuple(waiting))


class Reloader:
    """Reloads the settings on request, one reload at a time.

    Args:
        read: reads the settings as a start would. Raises ``SettingsError``.
        running: the settings in force.
        apply: puts changed ones into force.
    """

    def __init__(self, read: Callable[[], Settings], running: Settings, apply: Apply) -> None:
        self._read = read
        self._running = running
        self._apply = apply
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Request a reload; several requests before it happens are one."""
        self._asked.set()

    async def run(self) -> None:
        """Serve requests until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.reload()

    async def reload(self) -> None:
        """Reload once. Invalid settings are logged, and nothing changes."""
        try:
            change = compare(self._running, self._read())
            await self._apply(change.settings)
        except (SettingsError, OSError, UnicodeDecodeError) as error:
            log.error("settings not reloaded, nothing changed", reason=str(error))  # noqa: TRY400 - the text is all
            return
        except Exception:
            log.exception("settings not reloaded")  # a bug, and no reason to lose running jobs
            return
        self._running = change.settings
        log.info("settings reloaded", changed=list(change.changed))
        if change.waiting:
            log.warning("needs a restart", settings=", ".join(change.waiting))


def _section(settings: Settings, name: str) -> Section:
    section = getattr(settings, name)
    if not isinstance(section, Section):
        raise TypeError(f"{name} is no section of the settings")
    return section


def _differing(old: Section, new: Section) -> Iterator[str]:
    return (name for name in type(old).model_fields if getattr(old, name) != getattr(new, name))


def _variables(section: Section, fields: set[str]) -> list[str]:
    """The variables of these fields, in the order of the settings' table."""
    return [variable_of(field) for name, field in type(section).model_fields.items() if name in fields]
