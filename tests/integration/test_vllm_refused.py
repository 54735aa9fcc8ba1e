# SPDX-License-Identifier: Apache-2.0
"""A vLLM that cannot be used: the planner falls back to transformers and says why, or refuses where it is insisted on.

vLLM itself is not needed: a package of that name breaks where a real one does that does not fit its torch or this code.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from acestep_consumer.engine.adapters import PlannerSupervisor
from acestep_consumer.engine.messages import ConfigurePlanner
from acestep_consumer.engine.planner.loading import DeviceCrowded, LmUnusable, import_backend, load
from acestep_consumer.engine.planner.tokens import LmTokens
from acestep_consumer.engine.testing import tiny_lm

WRONG_TORCH = "raise ImportError('vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEab')"
WITHOUT_KERNELS = "import types; types.SimpleNamespace().rms_norm"
OTHER_INTERFACE = "def EngineArgs(**_): raise TypeError(\"got an unexpected keyword argument 'runner'\")"
NO_DEVICE = "def EngineArgs(**_): raise RuntimeError('Failed to infer device type')"

FakeVllm = Callable[[str, dict[str, str]], ConfigurePlanner]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_lm.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(checkpoints: Path) -> LmTokens:
    """The model's, read once: 64,000 of them take a second."""
    return LmTokens.load(checkpoints / tiny_lm.NAME)


def write_vllm(folder: Path, version: str, sources: dict[str, str]) -> None:
    """Write a package ``vllm`` with these modules, installed as this version."""
    for name, source in {"__init__": "", **sources}.items():
        place = folder / "vllm" / f"{name}.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(source, encoding="utf-8")
    about = folder / f"vllm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="ascii")


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Path, tokens: LmTokens) -> FakeVllm:
    """Installs such a package for this test, and returns a planner's settings."""
    monkeypatch.setattr(LmTokens, "load", lambda _: tokens)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)

    def install(version: str, sources: dict[str, str]) -> ConfigurePlanner:
        write_vllm(tmp_path, version, sources)
        monkeypatch.syspath_prepend(str(tmp_path))
        return ConfigurePlanner(model=tiny_lm.NAME, memory_gb=2, device="cpu", checkpoint_dir=checkpoints)

    return install


ENGINE, PROCESSOR, ARGUMENTS = "v1/engine/llm_engine", "v1/sample/logits_processor", "engine/arg_utils"
IMPORTED = {
    "__init__": "class ModelRegistry:\n    register_model = lambda *_: None",
    ENGINE: "class LLMEngine:\n    from_engine_args = lambda _: None",
    PROCESSOR: "BatchUpdate = LogitsProcessor = MoveDirectionality = object",
    "model_executor/models/qwen3": "Qwen3ForCausalLM = object",
}
"""What can be imported of a vLLM, as far as this project imports it."""

REFUSALS = pytest.mark.parametrize(
    ("version", "sources", "why"),
    [
        ("0.19.1", {}, r"vllm 0\.19\.1 is installed; .* vllm 0\.20 to 0\.33: pip install"),
        ("0.34.0", {}, r"vllm 0\.34\.0 is installed; .* vllm 0\.20 to 0\.33: pip install"),
        ("0.34rc1", {}, r"vllm 0\.34rc1 is installed"),
        ("1", {}, "vllm 1 is installed"),
        ("0.24.0", {ENGINE: WRONG_TORCH}, "vLLM cannot be imported: .*undefined symbol"),
        ("0.24.0", {ENGINE: WITHOUT_KERNELS}, "vLLM cannot be imported: .*rms_norm"),
        ("0.24.0", {ENGINE: ""}, "vLLM cannot be imported: No module named 'vllm.v1.sample"),
        ("0.24.0", IMPORTED | {ARGUMENTS: OTHER_INTERFACE}, "vLLM does not start: .*argument 'runner'"),
        ("0.24.0", IMPORTED | {ARGUMENTS: NO_DEVICE}, "vLLM does not start: Failed to infer device type"),
    ],
    ids=[
        "too old",
        "too new",
        "too new, before its release",
        "numbered otherwise",
        "for another torch",
        "without its kernels",
        "without a module",
        "with another interface",
        "on a machine without its device",
    ],
)


@REFUSALS
def test_a_vllm_that_cannot_be_used_is_replaced_by_transformers_with_the_reason(
    version: str, sources: dict[str, str], why: str, fake_vllm: FakeVllm
) -> None:
    configure = fake_vllm(version, sources)
    import_backend(configure)
    with capture_logs():  # without a set-up, structlog writes all variables of a traceback
        report = load(configure).report
    assert report.backend == "pt"
    (warning,) = report.warnings
    assert re.search(f"does not run on the preferred backend; vllm: {why}", warning)


@REFUSALS
def test_a_vllm_that_cannot_be_used_ends_the_start_where_it_is_insisted_on(
    version: str, sources: dict[str, str], why: str, fake_vllm: FakeVllm
) -> None:
    configure = replace(fake_vllm(version, sources), backend="vllm")
    import_backend(configure)
    with capture_logs(), pytest.raises(LmUnusable, match=f"{tiny_lm.NAME} cannot be loaded. vllm: {why}"):
        load(configure)


def test_a_vllm_that_does_not_start_beside_the_renderer_is_tried_after_it(fake_vllm: FakeVllm) -> None:
    """Too little memory has many faces. One that cannot be imported is not tried again."""
    configure = replace(fake_vllm("0.24.0", IMPORTED | {ARGUMENTS: OTHER_INTERFACE}), beside=True)
    import_backend(configure)
    with pytest.raises(DeviceCrowded, match="argument 'runner'"):
        load(configure)


async def test_the_planner_process_goes_on_with_transformers(
    fake_vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM's kernels are for another torch, importing them fails before the process has loaded anything."""
    planner = PlannerSupervisor(fake_vllm("0.24.0", {ENGINE: WRONG_TORCH}), max_attempts=1)
    planner.environment = {"PYTHONPATH": str(tmp_path)}
    report = await planner.start()
    await planner.stop()
    assert (report.backend, planner.restarts) == ("pt", 0)
    assert "undefined symbol" in report.warnings[0]
