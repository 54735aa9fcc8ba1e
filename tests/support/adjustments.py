# SPDX-License-Identifier: Apache-2.0
"""The adjustments of events, read from the sources that make them: what varies in their texts is ``HOLE``."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.event_warnings import HOLE

if TYPE_CHECKING:
    from collections.abc import Iterator

_SOURCES: Final = Path(__file__).parents[2] / "consumer/acestep_consumer"


def fields_and_reasons() -> Iterator[tuple[str, str]]:
    """Yield the field and the reason of each adjustment that the sources make, some in pairs that never go together."""
    for file in sorted(_SOURCES.rglob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef):
                scope = _Scope(module, function)
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Adjustment":
                        given = {each.arg: each.value for each in node.keywords}
                        yield from product(scope.texts(given["field"]), scope.texts(given["reason"]))


@dataclass(frozen=True, slots=True)
class _Scope:
    """A function and its module, in which names have their texts."""

    module: ast.Module
    function: ast.FunctionDef

    def texts(self, node: ast.expr) -> Iterator[str]:
        """Yield each text that an expression can have."""
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                yield from map("".join, product(*(tuple(self.texts(part)) for part in parts)))
            case ast.FormattedValue(value=value):
                yield from self.texts(value)
            case ast.IfExp(body=one, orelse=other):
                yield from (*self.texts(one), *self.texts(other))
            case ast.Name(id=name) if values := tuple(self._values(name)):
                for value in values:
                    yield from self.texts(value)
            case _:
                yield HOLE

    def _values(self, name: str) -> Iterator[ast.expr]:
        """Yield what the name is assigned, what a loop over a tuple gives it, or what calls give this parameter."""
        for node in ast.walk(self.function):
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    yield value
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                    yield value
                case ast.For(target=ast.Tuple(elts=targets), iter=ast.Name(id=rows)):
                    if name in (names := [each.id for each in targets if isinstance(each, ast.Name)]):
                        yield from self._column(rows, names.index(name))
        parameters = [each.arg for each in self.function.args.args if each.arg != "self"]
        if name in parameters:
            yield from self._given(parameters.index(name))

    def _column(self, rows: str, place: int) -> Iterator[ast.expr]:
        for table in self._values(rows):
            if isinstance(table, ast.Tuple):
                yield from (row.elts[place] for row in table.elts if isinstance(row, ast.Tuple))

    def _given(self, place: int) -> Iterator[ast.expr]:
        """Yield what calls of this function give it there: a caller's own name is looked up in the caller."""
        for caller in (each for each in ast.walk(self.module) if isinstance(each, ast.FunctionDef)):
            for node in ast.walk(caller):
                match node:
                    case ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called), args=args):
                        if called == self.function.name:
                            yield from map(ast.Constant, _Scope(self.module, caller).texts(args[place]))
