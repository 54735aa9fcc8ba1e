# SPDX-License-Identifier: Apache-2.0
"""The warnings of events that the sources write, read from the sources: what varies in them is ``HOLE``."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLE: Final = "…"
_ROOT: Final = Path(__file__).parents[2]
_SOURCES: Final = ("consumer/acestep_consumer", "schemas/acestep_schemas")
# Their warnings are an operator's, and in no event.
_OPERATORS: Final = {"amqp_urls.py", "startup.py", "lm_choice.py", "loading.py", "settings.py", "waiting_queue.py"}
_GENERATORS: Final = ("warnings", "without", "rereadings", "odd_flag", "outranked", "unknown", "kept")


def warnings_of_events() -> Iterator[str]:
    """Yield each warning that is appended to ``warnings``, yielded by a generator of them, or tells of a reduction."""
    for file in sorted(file for source in _SOURCES for file in (_ROOT / source).rglob("*.py")):
        if file.name in _OPERATORS:
            continue
        module = ast.parse(file.read_text(encoding="utf-8"))
        constants = dict(_constants(module))
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef):
                yield from filter(None, (_text(each, constants) for each in _warnings(function)))


def _warnings(function: ast.FunctionDef) -> Iterator[ast.expr]:
    generates = any(word in function.name for word in _GENERATORS)
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(attr="append", value=ast.Attribute(attr=name)), args=[given]):
                if name.endswith("warnings"):
                    yield given
            case ast.Yield(value=ast.expr() as given) if generates:
                yield given
            case ast.Return(value=ast.expr() as given) if function.name.startswith("_fewer_"):
                yield given


def _constants(module: ast.Module) -> Iterator[tuple[str, str]]:
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                yield name, text


def _text(node: ast.expr, constants: dict[str, str]) -> str | None:
    """Return the text of a literal; None for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return constants.get(name)
        case ast.FormattedValue(value=value):
            return _text(value, constants) or HOLE
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, constants) or "" for part in parts)
    return None
