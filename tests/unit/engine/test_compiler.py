# SPDX-License-Identifier: Apache-2.0
"""Whether this host can compile kernels, found out with the compilers that torch would call."""

import shutil
from pathlib import Path

import pytest

from acestep_consumer.engine.compiler import compiler_fault

WORKS = "#!/bin/sh\nexit 0\n"
LACKS_HEADERS = "#!/bin/sh\necho 'check.c:1:10: fatal error: Python.h: No such file or directory' >&2\nexit 1\n"
NAMES = {"cuda": ("CC", "gcc"), "cpu": ("CXX", "g++")}


@pytest.fixture(autouse=True)
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with these compilers and no others: a folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for variable, _ in NAMES.values():
        monkeypatch.delenv(variable, raising=False)
    return folder


def install(place: Path, text: str) -> Path:
    place.write_text(text)
    place.chmod(0o755)
    return place


@pytest.mark.parametrize("kind", NAMES)
def test_a_host_without_a_compiler_is_told_what_to_install(kind: str) -> None:
    fault = compiler_fault(kind)
    assert fault is not None
    assert fault.startswith("there is no C")
    assert fault.endswith(f"apt-get install {NAMES[kind][1]} python3-dev")


@pytest.mark.parametrize("kind", NAMES)
def test_a_compiler_on_the_path_that_works_is_no_fault(kind: str, compilers: Path) -> None:
    install(compilers / NAMES[kind][1], WORKS)
    assert compiler_fault(kind) is None


def test_clang_does_for_a_gpu(compilers: Path) -> None:
    install(compilers / "clang", WORKS)
    assert compiler_fault("cuda") is None


@pytest.mark.parametrize("kind", NAMES)
def test_the_variable_that_torch_reads_goes_before_the_path(
    kind: str, compilers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, name = NAMES[kind]
    install(compilers / name, WORKS)
    monkeypatch.setenv(variable, "/nonexistent")
    assert f"{variable} = /nonexistent is not there" in str(compiler_fault(kind))
    monkeypatch.setenv(variable, str(install(tmp_path / "own", WORKS)))
    assert compiler_fault(kind) is None


def test_a_compiler_without_pythons_headers_is_a_fault_with_its_words(compilers: Path) -> None:
    install(compilers / "gcc", LACKS_HEADERS)
    fault = compiler_fault("cuda")
    assert fault is not None
    assert "Python.h: No such file" in fault
    assert "python3-dev" in fault


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler")
def test_the_program_that_is_tried_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "error:" not in str(compiler_fault("cuda")).replace("fatal error: Python.h", "")
