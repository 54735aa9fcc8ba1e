# SPDX-License-Identifier: Apache-2.0
"""Scrape configuration, alert rules and dashboard: valid, tested, and about metrics that exist."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from acestep_consumer.broker.topology import DEAD_LETTER, GENERATE, UNROUTED, UNROUTED_KEPT, tier_queue
from acestep_consumer.policy.tiers import BUILT_IN
from infra import promtool
from infra.local.packages import ensure_rabbitmq
from tests.support.metrics_page import families_of_a_worker, page_of_a_worker, sample_names
from tests.support.rabbitmq_metrics import MeasuredRabbitMQ

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/prometheus"
CONFIGURATION: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yml").read_text())
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARDS = sorted((ROOT / "infra/grafana/dashboards").glob("*.json"))
PROVISIONING = ROOT / "infra/grafana/provisioning"

# What PromQL has of its own, or gets from every scrape; label names stand inside braces or after by and on.
PROMETHEUS_OWN = {"up"}
METRIC = re.compile(r"\b(?:acestep|rabbitmq)_[a-z0-9_]+\b|\bup\b")


def metrics_in(expression: str) -> set[str]:
    return set(METRIC.findall(re.sub(r'"[^"]*"', '""', expression)))


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def expressions_of(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]
    return asked + [str(variable.get("query", "")) for variable in dashboard["templating"]["list"]]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredRabbitMQ]:
    ensure_rabbitmq()
    with MeasuredRabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


@pytest.fixture(scope="module")
def broker_samples(broker: MeasuredRabbitMQ) -> set[str]:
    """The names of all samples that the scrape configuration gets from RabbitMQ."""
    found = set()
    for job in CONFIGURATION["scrape_configs"]:
        if job["job_name"].startswith("rabbitmq"):
            query = urlencode(job.get("params", {}), doseq=True)
            body = broker.page(f"{job.get('metrics_path', '/metrics')}?{query}")
            found |= {line.split()[2] for line in body.splitlines() if line.startswith("# TYPE")}
    return found


def test_the_configuration_and_its_rules_are_what_prometheus_takes() -> None:
    done = promtool.run("check", "config", FOLDER / "prometheus.yml")
    assert done.returncode == 0, done.stdout
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_the_rules_do_what_their_tests_say() -> None:
    done = promtool.run("test", "rules", FOLDER / "alerts_test.yml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_that_never_fires_fails_its_test(name: str, tmp_path: Path) -> None:
    """Only the cases that name the alert run: all of them, for each alert, take promtool many times as long."""
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == name):
        rule["expr"] = "vector(0) > 1"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    cases = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())
    cases["tests"] = [case for case in cases["tests"] if re.search(rf"\b{name}\b", str(case))]
    (tmp_path / "alerts_test.yml").write_text(yaml.safe_dump(cases))
    done = promtool.run("test", "rules", tmp_path / "alerts_test.yml")
    assert done.returncode != 0
    assert "FAILED" in done.stdout, "the cases are wrong, not the alert"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_what_is_wrong_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_links_to_a_heading_of_the_runbook_with_its_name(name: str) -> None:
    page, _, anchor = ALERTS[name]["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == name.lower()
    assert name in headings


def test_the_runbook_has_no_heading_of_an_alert_that_is_gone() -> None:
    assert re.findall(r"^## (\w+)$", (ROOT / "infra/docs/runbook.md").read_text(), re.MULTILINE) == list(ALERTS)


async def test_every_metric_of_ours_in_alerts_and_dashboards_is_on_a_workers_page() -> None:
    known = sample_names(families_of_a_worker())
    named = {metric for metric in everything_named() if metric.startswith("acestep_")}
    assert len(named) > 20
    assert named - known == set()


def test_every_metric_of_the_broker_in_alerts_and_dashboards_is_on_its_pages(broker_samples: set[str]) -> None:
    named = {metric for metric in everything_named() if metric.startswith("rabbitmq_")}
    assert named
    assert named - broker_samples == set()


async def test_promtool_finds_nothing_to_say_about_a_workers_page() -> None:
    done = promtool.run("check", "metrics", stdin=page_of_a_worker())
    assert (done.returncode, done.stdout) == (0, "")


def everything_named() -> set[str]:
    asked = [rule["expr"] for rule in ALERTS.values()]
    for path in DASHBOARDS:
        asked += expressions_of(json.loads(path.read_text()))
    return {metric for expression in asked for metric in metrics_in(expression)} - PROMETHEUS_OWN


def test_queues_are_named_as_the_worker_declares_them(broker: MeasuredRabbitMQ) -> None:
    text = (FOLDER / "alerts.yml").read_text() + "".join(path.read_text() for path in DASHBOARDS)
    queues = set(re.findall(r'queue=\\?"([^"\\]+)', text))
    assert queues <= {GENERATE, DEAD_LETTER, UNROUTED}
    assert {GENERATE, DEAD_LETTER} <= queues
    (tiers,) = set(re.findall(r'queue=~"([^"]+)', text))
    assert all(re.fullmatch(tiers, tier_queue(tier.name)) for tier in BUILT_IN.tiers)
    assert not any(re.fullmatch(tiers, queue) for queue in (GENERATE, DEAD_LETTER, UNROUTED))
    assert f">= {UNROUTED_KEPT}\n" in text


async def test_states_checks_and_codes_in_expressions_are_ones_that_a_worker_can_show() -> None:
    states = {"completed", "failed", "rejected", "cancelled", "expired"}
    families = families_of_a_worker()
    known = {
        "state": states,
        **{
            label: {sample.labels[label] for sample in families[family].samples}
            for family, label in (("acestep_stage_seconds", "stage"), ("acestep_ready", "check"))
        },
    }
    expressions = [rule["expr"] for rule in ALERTS.values()]
    for path in DASHBOARDS:
        expressions += expressions_of(json.loads(path.read_text()))
    for label, values in known.items():
        for found in re.findall(rf'\b{label}=~?"([^"$]+)"', "\n".join(expressions)):
            assert set(found.split("|")) <= values


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_of_a_dashboard_is_promql(path: Path, tmp_path: Path) -> None:
    """Only rules can be checked, so each expression becomes one; Grafana's variables get plausible values."""
    asked = [target["expr"] for panel in panels(json.loads(path.read_text())) for target in panel.get("targets", [])]
    plain = [expression.replace("$__rate_interval", "1m").replace("$worker", ".*") for expression in asked]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(plain)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool.run("check", "rules", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stdout
    assert f"{len(asked)} rules found" in done.stdout
    assert not any("$" in expression for expression in plain)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap_have_a_unit_and_ask_the_data_source_that_is_provisioned(path: Path) -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text())["datasources"]
    dashboard = json.loads(path.read_text())
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))
    for panel in panels(dashboard):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = set(product(columns, lines))
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["description"].endswith(".")


def test_grafana_finds_dashboards_where_compose_puts_them() -> None:
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards/acestep.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(mount.rsplit(":", 2)[:2] for mount in compose["grafana"]["volumes"] if mount.startswith("./"))
    assert mounts["./infra/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./infra/grafana/provisioning"] == "/etc/grafana/provisioning"
    prometheus = dict(mount.rsplit(":", 2)[:2] for mount in compose["prometheus"]["volumes"] if mount.startswith("./"))
    assert prometheus == {"./infra/prometheus": "/etc/prometheus"}
    for service in ("grafana", "prometheus"):
        assert compose[service]["profiles"] == ["observe"]


def test_the_scrape_targets_are_services_of_compose() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for job in CONFIGURATION["scrape_configs"]:
        hosts = [name for found in job.get("dns_sd_configs", []) for name in found["names"]]
        hosts += [target.split(":")[0] for group in job.get("static_configs", []) for target in group["targets"]]
        assert hosts
        assert set(hosts) <= set(services)


async def test_the_broker_page_is_read_as_prometheus_reads_it(broker: MeasuredRabbitMQ) -> None:
    families = {family.name for family in parse(broker.page("/metrics"))}
    assert "rabbitmq_disk_space_available_bytes" in families
