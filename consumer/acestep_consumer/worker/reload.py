# SPDX-License-Identifier: Apache-2.0
"""SIGHUP: the settings are read again, and those that can change under work in hand do.

All or nothing: settings that cannot be used change nothing. What needs a restart stays as it is and is named.
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
    "inputs": frozenset({"buckets", "hosts", "networks", "max_bytes", "lora_max_bytes", "timeout_s"}),
    "engine": frozenset({"scratch_min_gb"}),
    "worker": frozenset({"log_level", "execution_timeout_s"}),
}
"""By section, the fields that may change while jobs run."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """What another look at the settings brings.

    Attributes:
        settings: what is to hold: the running settings with the reloadable ones replaced.
        changed: the variables that hold from now on.
        waiting: the variables that need a restart.
    """

    settings: Settings
    changed: tuple[str, ...]
    waiting: tuple[str, ...]


Apply = Callable[[Settings], Awaitable[None]]
"""Let these settings hold. Raises ``SettingsError`` for a value that its user cannot read; nothing is changed then."""


def compare(running: Settings, found: Settings) -> SettingsChange:
    """Tell what of ``found`` can hold at once and what cannot. Pure."""
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
    """Reads the settings when asked, one reading at a time.

    Args:
        read: returns the settings as they would be at a start. Raises ``SettingsError``.
        running: the settings that hold now.
        apply: lets the changed ones hold.
    """

    def __init__(self, read: Callable[[], Settings], running: Settings, apply: Apply) -> None:
        self._read = read
        self._running = running
        self._apply = apply
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Have the settings read soon; asking again before that is one reading."""
        self._asked.set()

    async def run(self) -> None:
        """Serve those who ask, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.reload()

    async def reload(self) -> None:
        """Read and apply once. What cannot be used is logged, and all stays as it is."""
        try:
            change = compare(self._running, self._read())
            await self._apply(change.settings)
        except (SettingsError, OSError, UnicodeDecodeError) as error:
            log.error("settings not reloaded: all stays as it is", reason=str(error))  # noqa: TRY400 - the text is all
            return
        except Exception:
            log.exception("settings not reloaded")  # a bug, and no reason to lose the work in hand
            return
        self._running = change.settings
        log.info("settings reloaded", changed=list(change.changed))
        if change.waiting:
            log.warning("needs a restart", settings=", ".join(change.waiting))


def _section(settings: Settings, name: str) -> Section:
    section = getattr(settings, name)
    assert isinstance(section, Section)  # noqa: S101 - narrows the type
    return section


def _differing(old: Section, new: Section) -> Iterator[str]:
    return (name for name in type(old).model_fields if getattr(old, name) != getattr(new, name))


def _variables(section: Section, fields: set[str]) -> list[str]:
    """The variables of these fields, in the order of the README's table."""
    return [variable_of(field) for name, field in type(section).model_fields.items() if name in fields]
