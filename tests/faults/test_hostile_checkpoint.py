# SPDX-License-Identifier: Apache-2.0
"""Fault: a checkpoint or a LoRA brings code along. It is refused, and the code does not run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.domain.errors import InputUnreadable
from acestep_consumer.engine.planner.transformers_backend import load
from acestep_consumer.engine.renderer.checkpoints.checkpoint import load_models
from acestep_consumer.engine.renderer.checkpoints.registry import CheckpointError
from acestep_consumer.engine.renderer.device import DeviceReport
from acestep_consumer.engine.renderer.lora_file import read_lora
from tests.support.original_layout import Payload

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
TURBO, LM = "acestep-v15-turbo", "acestep-5Hz-lm-0.6B"
CPU = DeviceReport(device="cpu", name="CPU", vram_gb=0)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that hostile code would make; it must not be there in the end."""
    path = tmp_path / "code-has-run"
    pickle.loads(pickle.dumps(Payload(path)))  # noqa: S301 - the payload is ours, and works
    path.rmdir()
    yield path
    assert not path.exists()


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def load_dit(folder: Path) -> None:
    load_models(EngineSettings.model_validate({"config_path": str(folder)}), CPU, lambda _: None)


def load_lm(folder: Path) -> None:
    load(str(folder), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
        ("condition_encoder", "model.ckpt"),
    ],
)
def test_a_dit_whose_weights_are_a_pickle_is_refused(
    part: str, name: str, tiny_checkpoints: Path, mark: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_checkpoints / TURBO, tmp_path / "model")
    for weights in (folder / part).glob("*.safetensors"):
        weights.unlink()
    (folder / part / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match="model model cannot be loaded from"):
        load_dit(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_language_model_whose_weights_are_a_pickle_is_refused(
    name: str, tiny_checkpoints: Path, mark: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_checkpoints / LM, tmp_path / "lm")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        load_lm(folder)


def test_a_lora_that_is_a_pickle_under_another_name_is_refused(mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "jazz.safetensors"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(InputUnreadable, match="not a safetensors file"):
        read_lora(path)
    torch.save({"layer.lora_A.weight": Payload(mark)}, path)
    with pytest.raises(InputUnreadable, match="not a safetensors file"):
        read_lora(path)


def test_code_that_a_language_model_names_does_not_run(tiny_checkpoints: Path, mark: Path, tmp_path: Path) -> None:
    """``auto_map`` is how the hub's models name classes of their own."""
    folder = copied(tiny_checkpoints / LM, tmp_path / "lm")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n")
    for name, keys in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {key: ["evil.Evil", None] if key == "AutoTokenizer" else "evil.Evil" for key in keys}
        (folder / name).write_text(json.dumps(config))
    load_lm(folder)


@pytest.mark.parametrize(
    ("library", "name"), [("transformer", "Evil"), ("evil", "Evil"), ("os", "mkdir"), ("builtins", "exec")]
)
def test_a_dit_whose_parts_are_of_classes_of_its_own_is_refused(
    library: str, name: str, tiny_checkpoints: Path, mark: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_checkpoints / TURBO, tmp_path / "model")
    for place in (folder / "evil.py", folder / "transformer" / "transformer.py", folder / "transformer" / "evil.py"):
        place.write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = [library, name]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        load_dit(folder)


def constants_of(call: ast.Call) -> list[tuple[str | None, object]]:
    """The call's keyword arguments that are constants."""
    return [(each.arg, each.value.value) for each in call.keywords if isinstance(each.value, ast.Constant)]


@pytest.mark.parametrize("path", sorted((ROOT / "consumer").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_here_unpickles_or_trusts_the_code_of_a_checkpoint(path: Path) -> None:
    """Calls that would: ``torch.load`` without ``weights_only``, ``pickle``, ``trust_remote_code`` not ``False``."""
    nodes = tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | (
                {node.module} if isinstance(node, ast.ImportFrom) else set()
            )
            assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            assert node in {call.func for call in calls if ("weights_only", True) in constants_of(call)}
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
