# SPDX-License-Identifier: Apache-2.0
"""The Japanese page is current, and covers the earlier server's settings and all metrics, alerts and codes."""

import re

from acestep_consumer.config.settings import describe, known_variables
from acestep_schemas.events import ErrorCode
from infra.tables import JAPANESE, alert_rules
from tests.support.metrics_page import families_of_a_worker, sample_names

TEXT = JAPANESE.read_text(encoding="utf-8")


def section(number: int) -> str:
    return TEXT.split(f"\n## {number}. ")[1].split("\n## ")[0]


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


async def test_every_metric_of_a_worker_is_explained_and_no_other() -> None:
    families = families_of_a_worker()
    named = set(re.findall(r"`((?:acestep|process)_(?!consumer|schemas)\w+)`", section(12)))
    counters = {f"{name}_total" for name, family in families.items() if family.type == "counter"}
    others = {name for name, family in families.items() if family.type != "counter"}
    assert named <= sample_names(families) | set(families)
    assert (counters | others) - named == set()


def test_every_alert_is_explained_with_its_severity() -> None:
    explained = re.findall(r"^\| `(\w+)` \| (\w+) \| ", section(13), re.MULTILINE)
    assert explained == [(rule["alert"], rule["labels"]["severity"]) for rule in alert_rules()]


def test_every_error_code_is_explained() -> None:
    rows = re.findall(r"^\| (`.+?) \| ", section(3), re.MULTILINE)
    explained = [code for row in rows for code in re.findall(r"`(\w+)`", row) if code in set(ErrorCode)]
    assert sorted(explained) == sorted(ErrorCode)


def test_it_says_how_to_start() -> None:
    commands = "".join(re.findall(r"```bash\n(.*?)```", section(2), re.DOTALL))
    steps = ("pip install", "models pull", "doctor", "plan", "run", "submit", "status", "listen")
    places = [commands.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)
