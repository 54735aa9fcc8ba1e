# SPDX-License-Identifier: Apache-2.0
"""The start of both engines: side by side on a large card, one after the other on a small one, again where that fails.

The processes only start; what the planner loads with is read from the files that it writes.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from acestep_consumer.config.settings import load
from acestep_consumer.engine import engines as engines_module
from acestep_consumer.engine.adapters import PlannerSupervisor, RendererSupervisor
from acestep_consumer.engine.engines import Engines
from acestep_consumer.engine.messages import TO_ENGINE, ConfigurePlanner
from acestep_consumer.engine.supervisor import EngineUnusable
from acestep_consumer.policy.tiers import BUILT_IN
from tests.support.waiting import WITHIN_S, eventually

pytestmark = pytest.mark.usefixtures("forked_processes")

MODULE = "tests.support.light_start"


class Start:
    """Engines that start, and what the planner was told to load."""

    def __init__(self, folder: Path) -> None:
        self.loaded = folder / "loaded"
        self.loaded.mkdir()
        self.may_be_ready = folder / "ready"
        settings = load({"ACESTEP_CUDA_MPS": "false", "ACESTEP_INIT_LLM": "true"}, None)
        self.engines = Engines(settings, BUILT_IN, log_json=True)

    def loads(self) -> list[ConfigurePlanner]:
        found = [TO_ENGINE.validate_json(file.read_bytes()) for file in sorted(self.loaded.iterdir())]
        return [message for message in found if isinstance(message, ConfigurePlanner)]


MakeStart = Callable[..., Start]


@pytest.fixture
def make_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStart:
    def make(card_gb: float, *, driver: bool, crowded: bool = False) -> Start:
        for kind in (RendererSupervisor, PlannerSupervisor):
            monkeypatch.setattr(kind, "module", MODULE)
        monkeypatch.setattr("acestep_consumer.engine.supervisor.FIRST_RESTART_S", 0.01)
        monkeypatch.setattr(engines_module, "_NVIDIA_DRIVER", tmp_path if driver else tmp_path / "nothing")
        start = Start(tmp_path)
        for name, value in (
            ("LIGHT_CARD_GB", card_gb),
            ("LIGHT_MAY_BE_READY", start.may_be_ready),
            ("LIGHT_LOADED", start.loaded),
        ):
            monkeypatch.setenv(name, str(value))
        if crowded:
            monkeypatch.setenv("LIGHT_CROWDED", "1")
        return start

    return make


@pytest.mark.parametrize("driver", [True, False])
async def test_on_a_large_card_the_planner_loads_while_the_renderer_does(
    make_start: MakeStart, *, driver: bool
) -> None:
    start = make_start(80, driver=driver)
    starting = asyncio.create_task(start.engines.start())
    await eventually(lambda: len(start.loads()) == 1)
    assert not starting.done()
    (configure,) = start.loads()
    assert (configure.beside, configure.device) == (True, "cuda:0")
    assert configure.model.startswith("acestep-5Hz-lm")
    start.may_be_ready.touch()
    async with asyncio.timeout(WITHIN_S):
        await starting
    assert start.engines.ready
    assert len(start.loads()) == 1
    await start.engines.stop()


@pytest.mark.parametrize(
    ("lm_device", "place", "shared"),
    [
        ("auto", "cuda:0", True),
        ("cuda", "cuda:0", True),
        (" CUDA:0 ", "cuda:0", True),
        ("cuda:1", "cuda:1", False),
        ("cpu", "cpu", False),
    ],
)
async def test_the_renderer_leaves_memory_to_a_language_model_on_its_device_whatever_that_is_called(
    make_start: MakeStart, lm_device: str, place: str, *, shared: bool
) -> None:
    start = make_start(80, driver=False)
    variables = {"ACESTEP_CUDA_MPS": "false", "ACESTEP_INIT_LLM": "true", "ACESTEP_LM_DEVICE": lm_device}
    start.engines = Engines(load(variables, None), BUILT_IN, log_json=True)
    start.may_be_ready.touch()
    async with asyncio.timeout(WITHIN_S):
        await start.engines.start()
    assert [configure.device for configure in start.loads()] == [place]
    share = start.engines._renderer._configure.memory_gb
    assert (share is not None and share < 60) if shared else share is None
    await start.engines.stop()


async def test_a_language_model_that_leaves_the_renderer_no_memory_is_refused(make_start: MakeStart) -> None:
    start = make_start(3, driver=False)
    with pytest.raises(EngineUnusable, match=r"leaves the renderer none of the 3 GB of cuda:0: set ACESTEP_LM_DEVICE="):
        await start.engines.start()
    assert start.loads() == []


@pytest.mark.parametrize("driver", [True, False])
async def test_where_it_is_not_required_the_worker_starts_without_it(make_start: MakeStart, *, driver: bool) -> None:
    start = make_start(3, driver=driver)
    tiers = tuple(tier.model_copy(update={"lm_by_default": True}) for tier in BUILT_IN.tiers)
    table = BUILT_IN.model_copy(update={"tiers": tiers})
    start.engines = Engines(load({"ACESTEP_CUDA_MPS": "false"}, None), table, log_json=True)
    start.may_be_ready.touch()
    async with asyncio.timeout(WITHIN_S):
        await start.engines.start()
    assert start.loads() == []
    assert start.engines.limits().lm is None
    assert start.engines._renderer._configure.memory_gb is None
    await start.engines.stop()


@pytest.mark.parametrize("driver", [True, False])
async def test_on_a_small_card_the_planner_waits_until_the_renderer_has_measured(
    make_start: MakeStart, *, driver: bool
) -> None:
    start = make_start(24, driver=driver)
    starting = asyncio.create_task(start.engines.start())
    await eventually(lambda: "imports" in start.engines.start_seconds.get("planner", {}) or bool(start.loads()))
    assert start.loads() == []
    start.may_be_ready.touch()
    async with asyncio.timeout(WITHIN_S):
        await starting
    (configure,) = start.loads()
    assert configure.beside is False
    await start.engines.stop()


async def test_a_planner_that_finds_no_memory_beside_the_renderer_starts_again_after_it(make_start: MakeStart) -> None:
    start = make_start(80, driver=True, crowded=True)
    starting = asyncio.create_task(start.engines.start())
    await eventually(lambda: "planner" in start.engines.states and start.engines.states["planner"].restarts == 1)
    assert [configure.beside for configure in start.loads()] == [True]
    start.may_be_ready.touch()
    async with asyncio.timeout(WITHIN_S):
        await starting
    assert [configure.beside for configure in start.loads()] == [True, False]
    assert start.engines.ready
    await start.engines.stop()


async def test_a_planner_that_was_started_ahead_of_a_card_without_one_ends(
    make_start: MakeStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = make_start(3, driver=True)
    settings = load({"ACESTEP_CUDA_MPS": "false"}, None)
    start.engines = Engines(settings, BUILT_IN, log_json=True)
    start.may_be_ready.touch()
    ahead: list[PlannerSupervisor] = []
    make = start.engines._new_planner

    def remember(configure: ConfigurePlanner) -> PlannerSupervisor:
        ahead.append(make(configure))
        return ahead[-1]

    monkeypatch.setattr(start.engines, "_new_planner", remember)
    async with asyncio.timeout(WITHIN_S):
        await start.engines.start()
    assert list(start.engines.states) == ["renderer"]
    assert ahead[0].pid is None
    await start.engines.stop()
