# SPDX-License-Identifier: Apache-2.0
"""The README says what the code does: its tables are current, what it names exists."""

import re

from infra.tables import README, settings_table, tier_table, with_tables

TEXT = README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    """When this fails: ``bash infra/dev fix``."""
    assert with_tables(TEXT) == TEXT
    assert settings_table() in TEXT
    assert tier_table() in TEXT


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"`((?:consumer|schemas|tests|infra)/[\w/.]+)`", TEXT)
    assert named
    assert [name for name in named if not (README.parent / name).exists()] == []
