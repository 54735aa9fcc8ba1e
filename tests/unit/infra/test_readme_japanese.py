# SPDX-License-Identifier: Apache-2.0
"""The Japanese page says what the code does: settings, defaults, tiers, metrics, alerts and files exist as it says."""

import re

import yaml

from acestep_consumer.config.settings import describe, known_variables
from infra.tables import JAPANESE, README, japanese_tier_table
from tests.support.metrics_page import families_of_a_worker, sample_names

TEXT = JAPANESE.read_text(encoding="utf-8")
ROOT = README.parent


def test_its_tier_table_is_that_of_the_code() -> None:
    """When this fails: ``bash infra/dev fix``."""
    assert f"<!-- tiers -->\n{japanese_tier_table()}\n<!-- /tiers -->" in TEXT


def test_every_setting_that_it_names_is_one_and_has_the_default_that_it_gives() -> None:
    assert set(re.findall(r"\b(?:ACESTEP|MAX)_[A-Z0-9_]+", TEXT)) <= known_variables()
    defaults = {name: default for name, default, _ in describe()}
    given = re.findall(r"`(ACESTEP_\w+)`\W(\d+)\W", TEXT)
    assert len(given) >= 4
    assert [(name, value) for name, value in given if defaults[name] != value] == []


def test_the_settings_of_the_earlier_server_are_all_explained() -> None:
    inherited = {
        "ACESTEP_QUEUE_MAXSIZE",
        "ACESTEP_QUEUE_WORKERS",
        "ACESTEP_API_WORKERS",
        "ACESTEP_INIT_LLM",
        "ACESTEP_LM_MODEL_PATH",
        "ACESTEP_LM_BACKEND",
        "ACESTEP_OFFLOAD_TO_CPU",
        "ACESTEP_LM_OFFLOAD_TO_CPU",
        "ACESTEP_OFFLOAD_DIT_TO_CPU",
    }
    assert [name for name in inherited if f"`{name}`" not in TEXT] == []


async def test_every_metric_of_a_worker_that_it_names_exists() -> None:
    families = families_of_a_worker()
    named = set(re.findall(r"`(acestep_\w+)`", TEXT))
    assert len(named) > 15
    assert named - sample_names(families) - set(families) == set()


def test_every_alert_that_it_names_exists() -> None:
    rules = yaml.safe_load((ROOT / "infra/prometheus/alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    section = TEXT.split("## 12.")[1].split("## 13.")[0]
    named = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z0-9]+)+)`", section))
    assert len(named) > 10
    assert named <= alerts


def test_every_file_and_link_that_it_names_exists() -> None:
    named = re.findall(r"`((?:consumer|schemas|tests|infra)/[\w/.]+)`", TEXT)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert named
    assert links
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in links if not (JAPANESE.parent / link).exists()] == []


def test_the_readme_leads_to_it() -> None:
    assert "(infra/README.ja.md)" in README.read_text(encoding="utf-8")
