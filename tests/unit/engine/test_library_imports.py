# SPDX-License-Identifier: Apache-2.0
"""Imports of an engine: packages that nothing uses count as not installed meanwhile, and what is slow is done once.

That both engines import none of them in fact: tests/faults/test_engine_start.py.
"""

import gc
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from acestep_consumer.engine.library_imports import QUANTIZER, UNUSED, library_imports
from tests.support.collector import freeze_the_living


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_stays_frozen() -> Iterator[None]:
    yield
    freeze_the_living()


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*UNUSED, QUANTIZER):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("quantized", "hidden"), [(False, {*UNUSED, QUANTIZER}), (True, {*UNUSED})])
def test_what_is_not_used_cannot_be_found_until_the_imports_are_over(*, quantized: bool, hidden: set[str]) -> None:
    names = {*UNUSED, QUANTIZER}
    with library_imports(quantized=quantized):
        assert {name for name in names if find_spec(name) is None} == hidden
    assert all(map(find_spec, names))


def test_what_was_imported_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, QUANTIZER, sys)
    with library_imports(quantized=False):
        assert sys.modules[QUANTIZER] is sys
    assert sys.modules[QUANTIZER] is sys


def test_the_metadata_of_all_packages_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read() -> dict[str, list[str]]:
        reads.append("read")
        return {}

    monkeypatch.setattr(importlib.metadata, "packages_distributions", read)
    with library_imports(quantized=False):
        assert importlib.metadata.packages_distributions() is importlib.metadata.packages_distributions()
    assert reads == ["read"]
    assert importlib.metadata.packages_distributions is read


def test_collection_is_paused_for_imports_and_goes_on_after_them_without_what_they_made() -> None:
    before = gc.get_freeze_count()
    with library_imports(quantized=False):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


def test_a_command_that_ends_says_nothing_of_leaked_objects() -> None:
    """Libraries like Triton's look at their end whether their objects are gone; those that are frozen are not."""
    program = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "from acestep_consumer.engine.library_imports import library_imports\n"
        "with library_imports(quantized=False): import json\n"
        "print(gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]
    assert not done.stderr
