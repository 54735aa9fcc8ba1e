# SPDX-License-Identifier: Apache-2.0
"""The README's examples as files."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
_EXAMPLE = re.compile(r"<!-- example: (?P<name>[\w.]+) -->\n```\w+\n(?P<code>.*?)```", re.DOTALL)


def examples() -> dict[str, str]:
    """The code below each ``<!-- example: NAME -->``, by name."""
    return {found["name"]: found["code"] for found in _EXAMPLE.finditer(README.read_text(encoding="utf-8"))}
