# SPDX-License-Identifier: Apache-2.0
"""Prometheus itself watches a worker and its broker, as in compose's profile ``observe``, while jobs are done."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from acestep_consumer.client import Client
from infra import promtool
from infra.local.packages import ensure_rabbitmq
from infra.local.ports import LOOPBACK, PortClaim
from infra.local.process import Process, tail
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.support.rabbitmq_metrics import MeasuredRabbitMQ
from tests.support.worker import WorkerProcess, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "infra/grafana/dashboards/acestep.json").read_text())
ASKED = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
PATIENCE_S = 90
MAY_BE_EMPTY = {"Errors by code", "Memory of the renderer", "Busy", "Pack", "Failed of finished"}


@dataclass
class Prometheus:
    """A running Prometheus."""

    address: str

    def get(self, what: str, **parameters: str) -> Any:
        with urlopen(f"http://{self.address}/api/v1/{what}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[float]:
        """The values that the expression has now."""
        return [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredRabbitMQ]:
    ensure_rabbitmq()
    with MeasuredRabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


@pytest.fixture(scope="module")
def watched(
    broker: MeasuredRabbitMQ, s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    """A worker on that broker, with a renderer that needs no model."""
    servers = Environment.of(broker.amqp_url, s3)
    variables = servers.variables() | {"ACESTEP_S3_PREFIX": uuid.uuid4().hex, "ACESTEP_ROUTE_BY_TIER": "true"}
    with WorkerProcess(tmp_path_factory.mktemp("worker"), variables, light=True) as worker:
        yield worker


@pytest.fixture(scope="module")
def prometheus(
    broker: MeasuredRabbitMQ, watched: WorkerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus with the repository's configuration and rules; the targets alone, and how often, are this test's."""
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((ROOT / "infra/prometheus/prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(ROOT / "infra/prometheus/alerts.yml")]
    targets = {"acestep-worker": watched._claim.ports[0]}
    for job in configuration["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        port = targets.get(job["job_name"], broker._metrics_claim.ports[0])
        job["static_configs"] = [{"targets": [f"{LOOPBACK}:{port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    claim = PortClaim(1)
    address = f"{LOOPBACK}:{claim.ports[0]}"
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = [promtool.tool("prometheus"), *files, f"--web.listen-address={address}"]
    log = folder / "log"
    process = Process(command, env=clean_environment({}), folder=folder, log=log, guarded=True)
    try:
        yield Prometheus(address)
    finally:
        running = process.running()
        process.end(10)
        claim.release()
        assert running, tail(log)


def holds(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; while Prometheus does not answer it does not."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} seconds"
        time.sleep(0.2)


async def sing(url: str, prompts: tuple[str, ...]) -> None:
    """Submit these requests, and hear each to its end."""
    async with asyncio.timeout(PATIENCE_S), Client(url) as client:
        for prompt in prompts:
            job = await client.start({"prompt": prompt, "audio_duration": 10, "audio_format": "wav"})
            states = [event.state async for event in job.events()]
            assert states[-1] == "completed"


@pytest.fixture(scope="module")
def sung(prometheus: Prometheus, broker: MeasuredRabbitMQ) -> Prometheus:
    """A Prometheus that has seen a worker make three songs."""
    holds(lambda: prometheus.query("min by (instance) (acestep_ready) == 1"))
    asyncio.run(sing(broker.amqp_url, ("a waltz",)))
    # A series that begins with a job shows no rate for this job.
    holds(lambda: prometheus.query("acestep_jobs_total") == [1])
    asyncio.run(sing(broker.amqp_url, ("a polka", "a march")))
    holds(lambda: prometheus.query("acestep_jobs_total") == [3])
    return prometheus


def test_every_target_is_up(sung: Prometheus) -> None:
    targets = sung.get("targets")["activeTargets"]
    assert {target["labels"]["job"] for target in targets} == {"acestep-worker", "rabbitmq", "rabbitmq-queues"}
    assert [target["lastError"] for target in targets if target["health"] != "up"] == []


def test_every_rule_can_be_evaluated_and_none_is_set_off_by_a_worker_that_is_well(sung: Prometheus) -> None:
    rules = [rule for group in sung.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 15
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


@pytest.mark.parametrize("name", ASKED)
def test_a_panel_has_something_to_show(name: str, sung: Prometheus) -> None:
    """Except where nothing was wrong, and where there is no card."""
    expression = ASKED[name].replace("$__rate_interval", "1m").replace("$worker", ".*")
    assert sung.query(expression) or name.partition(":")[0] in MAY_BE_EMPTY


def test_what_was_done_adds_up(sung: Prometheus, watched: WorkerProcess) -> None:
    assert sung.query('acestep_jobs_total{state="completed"}') == [3]
    assert sung.query('acestep_stage_seconds_count{stage="total"}') == [3]
    assert sung.query("sum(acestep_job_errors_total)") == [0]
    assert sung.query("acestep_redeliveries_total") == [0]
    assert sung.query("acestep_in_hand") == [0]
    assert sung.query("acestep_workers") == [1]
    (sent,) = sung.query("acestep_s3_sent_bytes_total")
    assert sent > 3 * 100
    assert sung.query("acestep_s3_away") == [0]
    assert sung.query('rabbitmq_detailed_queue_consumers{queue="acestep.generate"}') == [1]
