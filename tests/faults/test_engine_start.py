# SPDX-License-Identifier: Apache-2.0
"""An engine process that does not come up: dead while loading, silent, or slow but alive."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from acestep_consumer.app import run_worker
from acestep_consumer.config.exit_codes import Exit
from acestep_consumer.config.settings import EngineSettings, load
from acestep_consumer.domain.errors import Interrupted
from acestep_consumer.engine.adapters import PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.messages import Configure, ConfigurePlanner, ToEngine
from acestep_consumer.engine.process import EngineProcess
from acestep_consumer.engine.supervisor import EngineState, EngineUnusable
from infra.local.s3 import SeaweedFS
from infra.local.stack import Environment
from tests.support.engines import render, supervisor
from tests.support.fake_engine import FakeEngines
from tests.support.waiting import WITHIN_S, eventually

NOBODY_LISTENS = "amqp://127.0.0.1:1/"


pytestmark = pytest.mark.usefixtures("quick_restarts")


async def test_an_engine_that_never_gets_ready_is_given_up() -> None:
    engine = supervisor("never-ready", start_s=0.5)
    with pytest.raises(EngineUnusable, match="died 3 times while loading"):
        await engine.start()
    await engine.stop()


async def test_a_process_that_is_paused_while_loading_is_replaced(tmp_path: Path) -> None:
    """It need not make progress for half an hour; its heartbeat is missed long before."""
    engine = supervisor(f"paused-once {tmp_path / 'mark'}", start_s=1800, silence_s=10)
    await engine.start()
    assert engine.state == EngineState(ready=True, restarts=1)
    await engine.stop()


@pytest.mark.usefixtures("fresh_processes")
@pytest.mark.parametrize(
    ("module", "configure", "quantizes"),
    [
        (
            RendererSupervisor.module,
            Configure(settings=EngineSettings(config_path="/nonexistent", quantization="int8")),
            True,
        ),
        (PlannerSupervisor.module, ConfigurePlanner(model="/nonexistent", memory_gb=1), False),
    ],
)
async def test_both_engines_send_heartbeats_before_anything_slow_and_import_only_what_they_use(
    module: str, configure: ToEngine, capfd: pytest.CaptureFixture[str], *, quantizes: bool
) -> None:
    process = await EngineProcess.start(module, {"PYTHONPROFILEIMPORTTIME": "1"})
    process.send(configure)
    async with asyncio.timeout(WITHIN_S):
        kinds = [message.kind async for message in process.messages()]
    await process.end()
    assert "alive" in kinds[:2]
    assert kinds[-1] == "unusable"
    lines = capfd.readouterr().err.splitlines()
    imports = [line for line in lines if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert {"torch", "transformers"} <= imported
    assert imported.isdisjoint({"boto3", "peft"})  # installed here, as torchao is
    assert ("torchao" in imported) is quantizes
    said = [line for line in lines if line not in imports]
    assert not [line for line in said if "torchao" in line or "_pytree" in line]  # what concerns no operator


async def test_an_engine_may_take_long_to_load_while_it_makes_progress() -> None:
    engine = supervisor("slowly-ready", start_s=3)
    await engine.start()
    assert engine.state == EngineState(ready=True, restarts=0)
    await engine.stop()


@dataclass
class UnusableEngines(FakeEngines):
    """Cannot load their models, or give up soon after they have."""

    starts: bool = False

    async def start(self) -> None:
        await asyncio.sleep(0.1)
        if not self.starts:
            raise EngineUnusable("no such model")

    async def wait_unusable(self) -> None:
        await asyncio.sleep(0.1)
        raise EngineUnusable("it died 3 times while loading")


@pytest.mark.parametrize("starts", [False, True])
async def test_an_unusable_engine_stops_the_start_while_the_broker_is_away(
    s3: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, starts: bool
) -> None:
    """The broker is waited for as long as it takes; nobody would learn of the engine meanwhile."""
    variables = Environment.of(NOBODY_LISTENS, s3).variables()
    settings = load(variables | {"ACESTEP_SCRATCH_DIR": str(tmp_path), "ACESTEP_HTTP_PORT": "0"}, None)
    for name in (name for name in variables if name.startswith("AWS_")):
        monkeypatch.setenv(name, variables[name])
    monkeypatch.setattr("acestep_consumer.app.set_up_logs", lambda *_: True)  # the log is the test's
    with capture_logs() as logs:
        async with asyncio.timeout(WITHIN_S):
            code = await run_worker(settings, grace_s=1, engines=UnusableEngines(starts=starts))
    assert code == Exit.ENGINE
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["engine cannot start"]


async def test_orders_that_wait_for_a_process_are_interrupted_when_none_will_come(tmp_path: Path) -> None:
    engine = supervisor("never-ready")
    starting = asyncio.create_task(engine.start())
    waiting = asyncio.create_task(render(engine, tmp_path, "sing"))
    await eventually(lambda: engine.pid)
    await engine.stop()
    with pytest.raises(Interrupted):
        await waiting
    with pytest.raises(EngineUnusable, match="stopped while it was loading"):
        await starting
