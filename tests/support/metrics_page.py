# SPDX-License-Identifier: Apache-2.0
"""The page of metrics as a worker composes it, without starting anything."""

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from acestep_consumer.app import Worker
from acestep_consumer.config.settings import load
from acestep_consumer.engine.engines import Engines
from acestep_consumer.gateway.auth import ApiKeyCheck
from acestep_consumer.gateway.broker_session import BrokerSession
from acestep_consumer.gateway.metrics import GatewayMetrics
from acestep_consumer.observability.metrics import Metrics
from acestep_consumer.policy.tiers import BUILT_IN


def page_of_a_worker(**variables: str) -> str:
    """The page of a worker that has not begun, with these settings. Needs a running event loop."""
    settings = load(variables, env_file=None)
    engines = Engines(settings, BUILT_IN, log_json=True)
    engines._renderer._start_clock.end(1.0)  # a first part of its start is over: its labels are on the page
    page = Worker(settings, engines, grace_s=0, read_again=lambda: settings)._state.metrics()
    return page.render("")[0].decode()


def families_of_a_worker(**variables: str) -> dict[str, Metric]:
    """Every family on that page, by name. Needs a running event loop."""
    return {family.name: family for family in parse(page_of_a_worker(**variables))}


def families_of_a_gateway() -> dict[str, Metric]:
    """Every family on the page of a gateway, by name."""
    session = BrokerSession(AsyncExitStack, lambda _: None)  # type: ignore[arg-type]  # it never connects
    page = GatewayMetrics(ApiKeyCheck(()), session, ())
    return {family.name: family for family in page._registry.collect()}


def samples_of(*sources: Callable[[], Iterable[Metric]]) -> dict[str, float]:
    """The samples of these metrics, named as on the page: `acestep_ready{check="broker"}`."""
    return samples_in(Metrics(*sources).render("")[0].decode())


def samples_in(page: str) -> dict[str, float]:
    """All samples of a page, named as on it."""
    lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def sample_names(families: dict[str, Metric]) -> set[str]:
    """The names under which these families' samples are asked for in PromQL."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {name + suffix for name, family in families.items() for suffix in suffixes.get(family.type, ("",))}
