# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer plan`` as a person runs it: on cards of many sizes, on a stand-in card, and without one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acestep_consumer.commands.terminal import two_digits
from tests.support.command import run_command

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "COLUMNS": "200"}
SEES_NOTHING = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
KEYS = {
    "card": {"name", "vram_gb", "found_by", "compute", "bandwidth"},
    "tier": {
        "name",
        "table_version",
        "max_duration_s_with_lm",
        "max_duration_s",
        "max_batch_with_lm",
        "max_batch",
    },
    "offload": {"models", "dit", "because"},
    "lm": {"model", "backend", "backend_is_set", "memory_gb", "memory_gib", "weights_gib", "songs_at_once"},
    "memory": {
        "card_gib",
        "reserve_gib",
        "lm_gib",
        "lm_song_gib",
        "renderer_gib",
        "renderer_weights_gib",
        "renderer_graphs_gib",
        "renderer_working_gib",
        "renderer_song_gib",
    },
    "workload": {"model", "duration_s", "batch", "thinking", "steps", "guided", "audio_format"},
    "workers": {"recommended", "set_now", "in_lm", "in_renderer", "elsewhere", "bound_by", "because"},
    "songs": {"a_minute", "lm_s", "renderer_s", "encoding_cores", "rests_on"},
}


def run_plan(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run_command("plan", *arguments, variables={**HIDDEN, **variables}, within_s=180)


def answer(*arguments: str, **variables: str) -> dict[str, Any]:
    done = run_plan(*arguments, "--json", **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


FakeSmi = Callable[..., dict[str, str]]


@pytest.fixture
def fake_smi(tmp_path: Path) -> FakeSmi:
    """An environment whose nvidia-smi knows the cards given as ``id="name, MiB, reserved MiB"``, without torch.

    ``old``: it does not know what is reserved.
    """

    def write(*, old: bool = False, **cards: str) -> dict[str, str]:
        smi = tmp_path / "nvidia-smi"
        source = (
            f"#!{sys.executable}\n"
            "import sys\n"
            f"cards = {cards!r}\n"
            "wanted = next(a.removeprefix('--id=') for a in sys.argv if a.startswith('--id='))\n"
            "new = '--query-gpu=name,memory.total,memory.reserved' in sys.argv\n"
            "assert new or '--query-gpu=name,memory.total' in sys.argv, sys.argv\n"
            f"if new and {old}:\n"
            "    sys.exit(print('Field \"memory.reserved\" is not a valid field to query.') or 2)\n"
            "assert '--format=csv,noheader,nounits' in sys.argv, sys.argv\n"
            "key = 'gpu' + wanted.replace('-', '_')\n"
            "print(cards[key]) if key in cards else sys.exit('No devices were found')\n"
        )
        smi.write_text(source)
        smi.chmod(0o755)
        (tmp_path / "torch.py").write_text(SEES_NOTHING)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}

    return write


@pytest.mark.parametrize(
    ("vram", "tier", "lm", "offload"),
    [
        ("8", "tier3", None, True),
        ("16", "tier6", "acestep-5Hz-lm-1.7B", False),
        ("24", "tier6", "acestep-5Hz-lm-1.7B", False),
        ("48", "unlimited", "acestep-5Hz-lm-4B", False),
        ("80", "unlimited", "acestep-5Hz-lm-4B", False),
        ("141", "unlimited", "acestep-5Hz-lm-4B", False),
    ],
)
def test_a_card_of_a_given_size_gets_the_workers_own_policy(
    vram: str, tier: str, lm: str | None, *, offload: bool
) -> None:
    found = answer("--vram", vram)
    assert found["card"]["found_by"] == "--vram"
    assert found["tier"]["name"] == tier
    assert (found["lm"] or {}).get("model") == lm
    assert found["offload"]["models"] is offload
    memory = found["memory"]
    shares = memory["lm_gib"] + memory["renderer_gib"] + memory["reserve_gib"]
    assert shares == pytest.approx(memory["card_gib"], abs=0.02)
    assert (found["songs"]["a_minute"] is not None) is found["fits"]
    assert found["workers"]["recommended"] >= 2


def test_what_offloading_copies_is_counted_and_said_where_it_happens() -> None:
    """At the bus of the card; the language model's own copies are not counted."""
    for arguments, counted in (
        (("--vram", "8"), "50 GB/s (PCIe 5)"),
        (("--card", "RTX 4070"), "25 GB/s (PCIe 4)"),
        (("--card", "RTX 4090"), None),
    ):
        notes = " ".join(answer(*arguments)["notes"])
        assert "not included" not in notes
        assert ("copied to the GPU for each batch" in notes) is (counted is not None)
        assert (counted or "") in notes
    moved = " ".join(answer("--card", "RTX 4090", ACESTEP_LM_OFFLOAD_TO_CPU="true")["notes"])
    assert "the time to copy the offloaded LM is not included" in moved


def test_the_json_has_the_same_keys_for_every_card_and_every_workload() -> None:
    for arguments in (("--vram", "141"), ("--vram", "24", "--duration", "120", "--batch", "2", "--steps", "20")):
        found = answer(*arguments)
        assert set(found) == {
            *KEYS,
            "other_tiers",
            "models",
            "quantization",
            "possible",
            "possible_int8",
            "fits",
            "notes",
        }
        assert {part: set(found[part]) for part in KEYS} == KEYS
        assert [set(other) for other in found["other_tiers"]] == [KEYS["tier"]]
        assert {key for model in found["models"] for key in model} == {"name", "size"}
        pairs = {"dit", "lm", "backend", "fits", "left_gib", "songs_a_minute"}
        assert {key for pair in (*found["possible"], *found["possible_int8"]) for key in pair} == pairs
        assert bool(found["possible_int8"]) is (found["card"]["vram_gb"] <= 24)


def test_a_language_model_that_leaves_no_room_is_told_with_one_that_fits() -> None:
    tight = answer("--vram", "16", ACESTEP_LM_MODEL_PATH="acestep-5Hz-lm-4B")
    assert tight["fits"] is False
    ways = "ACESTEP_LM_MODEL_PATH=acestep-5Hz-lm-1.7B or ACESTEP_QUANTIZATION=int8 fits"
    assert ways in tight["workers"]["because"]
    loose = answer("--vram", "16")  # left to itself, the worker takes that one
    assert loose["fits"] is True
    assert loose["songs"]["a_minute"] > 0


@pytest.mark.parametrize(
    ("gigabytes", "dit", "lm", "frees_at_least"),
    [
        (8, "2B", None, 1.4),
        (8, "2B", "acestep-5Hz-lm-0.6B", 1.7),
        (12, "XL 5B", None, 2.2),
        (16, "2B", "acestep-5Hz-lm-1.7B", 2.7),
        (20, "XL 5B", "acestep-5Hz-lm-1.7B", 4.5),
        (24, "XL 5B", "acestep-5Hz-lm-4B", 4.5),
    ],
)
def test_weights_in_int8_leave_more_of_a_small_card_whether_asked_for_or_only_shown(
    gigabytes: float, dit: str, lm: str | None, frees_at_least: float
) -> None:
    def left(pairs: list[dict[str, Any]]) -> float:
        return next(float(pair["left_gib"]) for pair in pairs if (pair["dit"], pair["lm"]) == (dit, lm))

    card = ("--vram", str(gigabytes))
    found, chosen = answer(*card), answer(*card, ACESTEP_QUANTIZATION="int8_weight_only")
    assert left(found["possible_int8"]) - left(found["possible"]) >= frees_at_least
    assert (chosen["quantization"], chosen["possible"], chosen["possible_int8"]) == ("int8", found["possible_int8"], [])


def test_a_choice_that_fits_in_int8_alone_fits_once_that_is_set() -> None:
    chosen = {"ACESTEP_LM_MODEL_PATH": "acestep-5Hz-lm-4B", "ACESTEP_INIT_LLM": "true"}
    assert answer("--vram", "16", **chosen)["fits"] is False
    assert answer("--vram", "16", ACESTEP_QUANTIZATION="int8", **chosen)["fits"] is True


def test_a_workload_is_clamped_as_a_request_would_be_and_its_model_decides_on_guidance() -> None:
    plain = ("--vram", "12", "--no-thinking", "--duration", "500", "--batch", "8")
    found = answer(*plain, "--model", "acestep-v15-base", "--steps", "50", "--format", "flac")
    assert found["workload"] == {
        "model": "acestep-v15-base",
        "duration_s": 360,
        "batch": 4,
        "thinking": False,
        "steps": 50,
        "guided": True,
        "audio_format": "flac",
    }
    assert sum("exceeds tier4's limits" in note for note in found["notes"]) == 2
    turbo = answer(*plain, "--model", "acestep-v15-turbo")
    assert turbo["workload"]["guided"] is False
    assert turbo["songs"]["a_minute"] > 5 * found["songs"]["a_minute"]


def test_the_card_is_found_by_nvidia_smi_without_torch(fake_smi: FakeSmi) -> None:
    environ = fake_smi(gpu0="NVIDIA H200, 143771, [N/A]")
    found = answer(**environ)
    assert found["card"] == {
        "name": "NVIDIA H200",
        "vram_gb": 140.4,
        "found_by": "nvidia-smi",
        "compute": 1.0,
        "bandwidth": 1.0,
    }
    assert found["songs"]["rests_on"].startswith("calculated from times measured on one NVIDIA H200")
    assert "whole workers there made 144 to 147" in found["songs"]["rests_on"]
    assert found["songs"]["encoding_cores"] <= (os.cpu_count() or 1)


def test_the_memory_that_the_driver_keeps_is_not_counted_since_a_worker_does_not_see_it(fake_smi: FakeSmi) -> None:
    new = answer(**fake_smi(gpu0="NVIDIA A100-SXM4-80GB, 81920, 869"))
    assert new["card"]["vram_gb"] == 79.15
    old = answer(**fake_smi(old=True, gpu0="NVIDIA A100-SXM4-80GB, 81920"))
    assert (old["card"]["vram_gb"], old["card"]["found_by"]) == (80, "nvidia-smi")


def test_the_device_setting_and_the_visible_cards_choose_which_one(fake_smi: FakeSmi) -> None:
    environ = fake_smi(gpu3="NVIDIA L4, 23034, 0", gpuGPU_1d0c="NVIDIA L40S, 46068, 0") | {
        "CUDA_VISIBLE_DEVICES": "3,GPU-1d0c"
    }
    assert answer(**environ)["card"]["name"] == "NVIDIA L4"
    assert answer(**environ, ACESTEP_DEVICE="cuda:1")["card"]["name"] == "NVIDIA L40S"


def test_max_cuda_vram_makes_the_card_smaller_and_vram_wins_over_it(fake_smi: FakeSmi) -> None:
    environ = fake_smi(gpu0="NVIDIA H200, 143771, 0") | {"MAX_CUDA_VRAM": "24"}
    pretended = answer(**environ)
    assert (pretended["card"]["name"], pretended["card"]["vram_gb"]) == ("NVIDIA H200", 24)
    assert pretended["tier"]["name"] == "tier6"
    assert answer("--vram", "8", **environ)["card"]["vram_gb"] == 8


def test_another_card_is_scaled_by_its_data_sheet_and_an_unknown_one_is_not(fake_smi: FakeSmi) -> None:
    scaled = answer(**fake_smi(gpu0="NVIDIA L40S, 46068, 0"), ACESTEP_INIT_LLM="false")
    assert "scaled by data sheets: 362 of 989 TFLOP/s" in scaled["songs"]["rests_on"]
    unknown = answer("--vram", "45", "--card", "Frobozz 9000", ACESTEP_INIT_LLM="false")
    assert "the figures are an H200's, expect less" in unknown["songs"]["rests_on"]
    assert scaled["songs"]["renderer_s"] > 2 * unknown["songs"]["renderer_s"]


@pytest.mark.parametrize("name", ["RTX 3090", "NVIDIA GeForce RTX 3090", "rtx3090"])
def test_a_card_that_is_known_by_name_has_its_own_memory_and_speed_however_it_is_spelled(name: str) -> None:
    found = answer("--card", name)
    assert found["card"]["name"] == "NVIDIA GeForce RTX 3090"
    assert (found["card"]["vram_gb"], found["card"]["found_by"], found["tier"]["name"]) == (24, "--card", "tier6")
    assert found["songs"] == answer("--vram", "24", "--card", name)["songs"]
    assert found["songs"]["a_minute"] < answer("--vram", "24")["songs"]["a_minute"] / 3
    assert answer("--card", name, MAX_CUDA_VRAM="12")["card"]["vram_gb"] == 12


def test_a_card_whose_memory_is_not_known_wants_it_given() -> None:
    done = run_plan("--card", "Frobozz 9000")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the memory of Frobozz 9000 is unknown: add --vram GB" in done.stderr


def test_figures_of_another_card_are_said_to_be_that_before_they_are_shown() -> None:
    lines = run_plan("--vram", "45", "--card", "Frobozz 9000").stdout.splitlines()
    assert lines[0] == "Unknown GPU: Frobozz 9000. All speeds below are those of an H200; expect less."
    assert "Unknown" not in run_plan("--card", "L40S").stdout


def test_without_a_card_it_says_who_was_asked_and_answers_for_the_lowest_tier() -> None:
    found = answer()
    assert found["card"]["vram_gb"] == 0
    assert found["tier"]["name"] == "tier1"
    assert found["songs"]["a_minute"] is None
    assert found["memory"] is None
    assert any("no GPU detected" in note and "--vram" in note for note in found["notes"])


def test_a_driver_that_does_not_answer_is_quoted(fake_smi: FakeSmi) -> None:
    found = answer(**fake_smi())
    assert any("No devices were found" in note and "No module named 'torch'" in note for note in found["notes"])


def test_a_device_that_is_not_there_ends_with_5_and_names_the_setting() -> None:
    done = run_plan(ACESTEP_DEVICE="xpu:7")
    assert done.returncode == 5
    assert "ACESTEP_DEVICE = xpu:7" in done.stderr


def test_an_own_tier_table_counts_and_a_broken_one_stops_it(tmp_path: Path) -> None:
    table = tmp_path / "tiers.toml"
    row = "max_seconds_with_lm = 60\nmax_seconds = 90\nmax_batch_with_lm = 1\nmax_batch = 3\n"
    table.write_text(f'version = "ours-1"\n[[tiers]]\nname = "all"\n{row}')
    found = answer("--vram", "48", ACESTEP_TIER_TABLE=str(table))
    assert (found["tier"]["name"], found["tier"]["table_version"], found["workload"]["duration_s"]) == (
        "all",
        "ours-1",
        90,
    )
    assert [other["table_version"] for other in found["other_tiers"]] == ["acestep-1.5-2026-02", "acestep-1.5-2026-06"]
    newer = answer("--vram", "18", ACESTEP_TIER_TABLE="acestep-1.5-2026-06")
    assert (newer["tier"]["name"], [other["name"] for other in newer["other_tiers"]]) == ("tier6a", ["tier6"])
    assert any("weights in int8" in note for note in newer["notes"])
    table.write_text("version = ")
    broken = run_plan("--vram", "48", ACESTEP_TIER_TABLE=str(table))
    assert broken.returncode == 2
    assert "ACESTEP_TIER_TABLE" in broken.stderr


def test_the_table_for_eyes_says_what_the_json_says() -> None:
    found = answer("--vram", "141", "--cores", "4")
    text = " ".join(run_plan("--vram", "141", "--cores", "4").stdout.split())
    assert f"ACESTEP_QUEUE_WORKERS={found['workers']['recommended']} " in text
    assert "`auto`" in text
    assert f"about {two_digits(found['songs']['a_minute'])} at best" in text
    for told in (found["workers"]["because"], found["songs"]["rests_on"], *found["notes"]):
        assert told in text
    assert "limited by encoding mp3 on 4 CPU cores" in text


def test_a_figure_says_whose_it_is() -> None:
    """The first line, before any figure, and the last one."""
    for arguments, first, last in (
        (("--vram", "24"), "No --card: all speeds below are those of an H200; a GPU of 24 GB", "(on an H200)"),
        (("--card", "RTX 4090"), "GPU", "(scaled from an H200, not measured)"),
        (("--card", "H200"), "GPU", "(calculated)"),
    ):
        text = run_plan(*arguments).stdout
        assert text.startswith(first)
        assert f"at best {last}" in text
        assert "calculated, a worker measures at its start" in text


def test_a_language_model_that_is_slow_because_vllm_has_no_room_is_shown_as_that() -> None:
    slow = [pair for pair in answer("--vram", "24")["possible"] if pair["backend"] == "pt"]
    assert {pair["lm"] for pair in slow} == {"acestep-5Hz-lm-0.6B"}
    assert "acestep-5Hz-lm-0.6B, on pt" in run_plan("--vram", "24").stdout


@pytest.mark.parametrize(("vram", "graphs"), [("8", 0), ("24", 0.1), ("40", 0.43), ("141", 0.43)])
def test_the_memory_of_cuda_graphs_is_counted_where_a_worker_has_them(vram: str, graphs: float) -> None:
    memory = answer("--vram", vram)["memory"]
    assert memory["renderer_graphs_gib"] == pytest.approx(graphs, abs=0.01)
    without = answer("--vram", vram, ACESTEP_COMPILE="false")
    weights = memory["renderer_weights_gib"] - without["memory"]["renderer_weights_gib"]
    assert weights == pytest.approx(graphs, abs=0.011)
    assert any("run uncompiled" in note for note in without["notes"])


def test_a_turbo_model_is_planned_with_the_steps_and_the_guidance_that_a_worker_gives_it() -> None:
    found = answer("--vram", "24", "--steps", "50", "--guided")
    assert (found["workload"]["steps"], found["workload"]["guided"]) == (8, False)
    assert {"turbo models take at most 8 steps: calculated with 8"} < set(found["notes"])
    assert found["songs"] == answer("--vram", "24")["songs"]


def test_auto_that_stops_too_early_is_told_with_the_number_to_set() -> None:
    notes = " ".join(answer("--card", "H200", "--duration", "120", ACESTEP_QUEUE_WORKERS_MAX="64")["notes"])
    assert "ACESTEP_QUEUE_WORKERS_MAX = 64: set it to" in notes


@pytest.mark.parametrize("workload", [("300",), ("30",), ("30", "--no-thinking")], ids=" ".join)
def test_auto_reaches_what_the_stages_of_the_largest_card_need(workload: tuple[str, ...]) -> None:
    found = answer("--card", "H200", "--duration", *workload)
    assert found["workers"]["recommended"] > 64
    assert not any("ACESTEP_QUEUE_WORKERS_MAX" in note for note in found["notes"])


def test_help_teaches_with_examples() -> None:
    text = " ".join(run_plan("--help").stdout.split())
    assert 'plan --card "RTX 4090"' in text
    assert "ACESTEP_QUEUE_WORKERS=auto" in text


@pytest.mark.parametrize(
    "arguments", [("--vram", "nan"), ("--vram", "-1"), ("--duration", "nan"), ("--format", "midi")]
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[str, str]) -> None:
    done = run_plan(*arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
