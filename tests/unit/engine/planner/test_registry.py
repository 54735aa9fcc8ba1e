# SPDX-License-Identifier: Apache-2.0
"""Where a language model is looked for: a path, the checkpoint folder, the hub, in this order."""

import json
from pathlib import Path

import pytest

from acestep_consumer.config.settings import EngineSettings
from acestep_consumer.engine.planner.registry import HUB, LmLocation, LmNotFound, lm_request, resolve
from acestep_consumer.policy.benchmarks import LM_SIZES, LmSize
from acestep_consumer.policy.lm_choice import LmRequest
from acestep_consumer.policy.tiers import LMS


def lm(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_goes_before_the_checkpoint_folder_and_that_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "acestep-5Hz-lm-0.6B"
    assert resolve(name, tmp_path / "checkpoints") == LmLocation(hub_id=f"ACE-Step/{name}")
    second = lm(tmp_path / "checkpoints" / name)
    assert resolve(name, tmp_path / "checkpoints") == LmLocation(folder=second)
    first = lm(tmp_path / name)
    assert resolve(name, tmp_path / "checkpoints") == LmLocation(folder=first)


def test_a_folder_without_a_model_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    with pytest.raises(LmNotFound):
        resolve("ours", tmp_path)


def test_any_hub_id_may_be_named() -> None:
    assert resolve("somebody/their-lm", None) == LmLocation(hub_id="somebody/their-lm")


def test_a_model_that_is_nowhere_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(LmNotFound, match=r"looked for .*acestep-5Hz-lm-1\.7B; set ACESTEP_LM_MODEL_PATH"):
        resolve("acestep-5Hz-lm-1.7B", tmp_path)
    with pytest.raises(LmNotFound, match="ACESTEP_CHECKPOINT_DIR is unset"):
        resolve("acestep-5Hz-lm-1.7B", None)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("1.7B", "did you mean acestep-5Hz-lm-1.7B?"),
        ("acestep-5hz-lm-1.7b", "did you mean acestep-5Hz-lm-1.7B?"),
        ("acestep-lm-4B", "did you mean acestep-5Hz-lm-4B?"),
        ("my-own", f"set ACESTEP_LM_MODEL_PATH to one of {', '.join(LMS)}, or to a folder"),
    ],
)
def test_a_name_that_is_nearly_that_of_a_published_model_is_told_with_it(named: str, said: str) -> None:
    with pytest.raises(LmNotFound) as refusal:
        resolve(named, None)
    assert said in str(refusal.value)


def test_the_hub_has_models_that_the_tiers_know() -> None:
    assert set(HUB) < set(LMS)


def installed(folder: Path) -> Path:
    (lm(folder) / "model.safetensors").touch()
    return folder


def request_in(checkpoint_dir: Path | None, **environ: str) -> LmRequest:
    return lm_request(EngineSettings(checkpoint_dir=checkpoint_dir), environ)


def test_the_models_on_the_disk_are_those_with_weights(tmp_path: Path) -> None:
    small, _, large = LMS
    installed(tmp_path / "checkpoints" / small)
    lm(tmp_path / "checkpoints" / large)  # a download that was broken off
    found = request_in(tmp_path / "checkpoints", HF_HOME=str(tmp_path))
    assert (found.on_disk, found.on_hub) == (frozenset({small}), frozenset(HUB))


def test_what_was_downloaded_earlier_is_on_the_disk_too(tmp_path: Path) -> None:
    small, _, large = LMS
    installed(tmp_path / "hub" / f"models--ACE-Step--{large}" / "snapshots" / "1")
    lm(tmp_path / "hub" / f"models--ACE-Step--{small}" / "snapshots" / "1")
    assert request_in(None, HF_HOME=str(tmp_path)).on_disk == frozenset({large})
    assert request_in(None, HF_HUB_CACHE=str(tmp_path / "hub")).on_disk == frozenset({large})
    assert request_in(None, HF_HOME=str(tmp_path / "other")).on_disk == frozenset()


def test_offline_nothing_can_be_downloaded(tmp_path: Path) -> None:
    assert request_in(None, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").on_hub == frozenset()


def test_the_settings_are_in_it(tmp_path: Path) -> None:
    settings = EngineSettings(init_llm=True, lm_model_path="ours", lm_backend="pt")
    found = lm_request(settings, {"HF_HOME": str(tmp_path)})
    assert (found.init, found.model, found.backend) == (True, "ours", "pt")


QWEN3_0_6B = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 217_204, "tie_word_embeddings": True,
}  # fmt: skip


def size_of(folder: Path, **changes: object) -> LmSize | None:
    """The size that is read from a folder of the operator's own, beside a stock name that is not there."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**QWEN3_0_6B, **changes}))
    settings = EngineSettings(lm_model_path=folder.name, checkpoint_dir=folder.parent)
    return lm_request(settings, {"HF_HOME": str(folder)}).sizes.get(folder.name)


def test_a_model_on_the_disk_has_the_size_of_its_configuration(tmp_path: Path) -> None:
    ours = tmp_path / "acestep-5Hz-lm-4B"  # whatever it is called
    assert size_of(ours) == LM_SIZES["acestep-5Hz-lm-0.6B"]
    assert size_of(ours, vocab_size=218_000) == LM_SIZES["acestep-5Hz-lm-0.6B"]
    larger = {"hidden_size": 2048, "intermediate_size": 6144}
    assert size_of(ours, **larger) == LM_SIZES["acestep-5Hz-lm-1.7B"]
    other = size_of(ours, **larger, tie_word_embeddings=False, num_key_value_heads=4)
    assert other is not None
    assert (other.parameters // 10**7, other.layers, other.keys_width) == (224, 28, 4 * 128)


def test_a_configuration_that_does_not_say_the_size_gives_none(tmp_path: Path) -> None:
    for broken in ({"hidden_size": None}, {"vocab_size": "many"}, {"num_attention_heads": 0, "head_dim": None}):
        assert size_of(tmp_path / "ours", **broken) is None
    (tmp_path / "ours/config.json").write_text("[]")
    assert lm_request(EngineSettings(lm_model_path=str(tmp_path / "ours")), {"HF_HOME": str(tmp_path)}).sizes == {}


def test_a_model_in_the_hubs_cache_has_its_size_too(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--somebody--their-lm/snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(QWEN3_0_6B))
    found = lm_request(EngineSettings(lm_model_path="somebody/their-lm"), {"HF_HOME": str(tmp_path)})
    assert found.sizes == {"somebody/their-lm": LM_SIZES["acestep-5Hz-lm-0.6B"]}
