# SPDX-License-Identifier: Apache-2.0
"""The AsyncAPI document, judged by the official parser."""

import json
from pathlib import Path

import pytest

from acestep_schemas.asyncapi import asyncapi
from acestep_schemas.export import documents
from tests.support.node import FOLDER, ensure_modules, run_node

CHECK = FOLDER / "check_asyncapi.mjs"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Path:
    return ensure_modules()


def test_the_official_parser_finds_no_error_and_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "asyncapi.json"
    path.write_text(documents()["asyncapi.json"], encoding="utf-8")
    done = run_node(CHECK, str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_official_parser_would_find_a_wrong_binding_and_a_wrong_reference(tmp_path: Path) -> None:
    document = asyncapi()
    document["channels"]["requests"]["bindings"]["amqp"]["exchange"]["type"] = "round"
    document["channels"]["jobEvents"]["messages"]["started"]["$ref"] = "#/components/messages/begun"
    path = tmp_path / "asyncapi.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    done = run_node(CHECK, str(path))
    assert done.returncode == 1
    assert "exchange.type" in done.stdout
    assert "begun" in done.stdout
