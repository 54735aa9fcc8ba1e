# SPDX-License-Identifier: Apache-2.0
"""The texts of adjustments and edits of events, read from the sources that write them: what varies is ``HOLE``."""

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
    for scope, given in _made("Adjustment"):
        yield from product(scope.texts(given["field"]), scope.texts(given["reason"]))


def causes_of_edits() -> Iterator[str]:
    """Yield why each value follows from an edit, as far as the text stands in the module that makes the edit."""
    for scope, given in _made("Edit"):
        yield from (text for text in scope.texts(given["because"]) if text != HOLE)


def _made(name: str) -> Iterator[tuple[_Scope, dict[str, ast.expr]]]:
    """Yield the scope of each call of this class, and what it is given by name."""
    for file in sorted(_SOURCES.rglob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        for function in (each for each in ast.walk(module) if isinstance(each, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                    given = {each.arg: each.value for each in node.keywords if each.arg is not None}
                    if {"field"} <= given.keys():
                        yield _Scope(module, function), given


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
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                    if name in (names := [each.id for each in targets if isinstance(each, ast.Name)]):
                        yield from self._part(value, names.index(name))
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                    yield value
                case ast.For(target=ast.Tuple(elts=targets), iter=ast.Name(id=rows)):
                    if name in (names := [each.id for each in targets if isinstance(each, ast.Name)]):
                        yield from self._column(rows, names.index(name))
        parameters = [each.arg for each in self.function.args.args if each.arg != "self"]
        if name in parameters:
            yield from self._given(parameters.index(name))

    def _part(self, value: ast.expr, place: int) -> Iterator[ast.expr]:
        """Yield what stands there in a tuple, or in those that a function of this module returns."""
        match value:
            case ast.Tuple(elts=parts):
                yield parts[place]
            case ast.Call(func=ast.Name(id=called)):
                for function in ast.walk(self.module):
                    if isinstance(function, ast.FunctionDef) and function.name == called:
                        scope = _Scope(self.module, function)
                        for node in ast.walk(function):
                            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                                yield from map(ast.Constant, scope.texts(node.value.elts[place]))

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
                        if called == self.function.name and len(args) > place:
                            yield from map(ast.Constant, _Scope(self.module, caller).texts(args[place]))
