# SPDX-License-Identifier: Apache-2.0
"""The documentation as tests read it: its pages, the examples and events in them, and their commands."""

import json
import re
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
DOCS: Final = ROOT / "infra/docs"
PAGES: Final = (
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "schemas/README.md",
    ROOT / "infra/kubernetes/README.md",
    *sorted(DOCS.glob("*.md")),
)
"""Every page of the documentation."""

_EXAMPLE = re.compile(r"<!-- example: (?P<name>[\w.]+) -->\n```\w+\n(?P<code>.*?)```", re.DOTALL)
_EVENT = re.compile(r"<!-- event: (?P<state>\w+) -->\n```json\n(?P<event>.*?)```", re.DOTALL)
_BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def text_of(page: Path) -> str:
    """The page's Markdown."""
    return page.read_text(encoding="utf-8")


def examples() -> dict[str, str]:
    """The code below each ``<!-- example: NAME -->`` of all pages, by name."""
    return {found["name"]: found["code"] for page in PAGES for found in _EXAMPLE.finditer(text_of(page))}


def events() -> dict[str, Any]:
    """The events of the README, below each ``<!-- event: STATE -->``, by state."""
    return {found["state"]: json.loads(found["event"]) for found in _EVENT.finditer(text_of(README))}


def shell_blocks(*pages: Path) -> list[str]:
    """What these pages give to type into a shell, a text for each block."""
    return [block for page in pages for block in _BASH.findall(text_of(page))]


def shell_lines(*pages: Path) -> list[str]:
    """The commands of ``shell_blocks``, without comments."""
    return [line.partition("#")[0].strip() for block in shell_blocks(*pages) for line in block.splitlines()]
