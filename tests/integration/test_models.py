# SPDX-License-Identifier: Apache-2.0
"""``acestep-consumer models`` against a server that speaks the hub's protocol."""

import fcntl
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import run_command
from tests.support.hub import WEIGHTS, Hub, published, weights
from tests.support.worker import COMMAND, ROOT, clean_environment

TURBO, SHARED = "acestep-v15-turbo", ("vae", "Qwen3-Embedding-0.6B")
LM = "acestep-5Hz-lm-1.7B"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


class Machine:
    """A machine with a checkpoint folder, an empty cache and a hub."""

    def __init__(self, folder: Path, hub: Hub, **more: str) -> None:
        self.checkpoints = folder / "checkpoints"
        self.variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), **more}
        self.variables["ACESTEP_CHECKPOINT_DIR"] = str(self.checkpoints)

    def models(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return run_command("models", *arguments, variables=self.variables | more)

    def listed(self) -> dict[str, dict[str, Any]]:
        done = self.models("list", "--json")
        assert done.returncode == 0, done.stderr
        return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}

    def state(self, name: str) -> str:
        return str(self.listed()[name]["state"])

    def files(self) -> set[str]:
        paths = (path for path in self.checkpoints.rglob("*") if path.is_file())
        return {str(path.relative_to(self.checkpoints)) for path in paths}


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub)


def test_pull_brings_a_model_with_all_that_it_needs_and_no_code(machine: Machine, hub: Hub) -> None:
    assert {each["state"] for each in machine.listed().values()} == {"absent"}
    done = machine.models("pull", TURBO, "--json")
    assert done.returncode == 0, done.stderr
    assert {(line["name"], line["state"]) for line in map(json.loads, done.stdout.splitlines())} == {
        (name, "complete") for name in (TURBO, LM, *SHARED)
    }
    assert f"acestep-consumer run --checkpoints {machine.checkpoints} --model {TURBO}" in done.stderr
    main = hub.repositories["ACE-Step/Ace-Step1.5"]
    wanted = {name for name in main if not name.endswith((".py", ".md"))}
    assert machine.files() == wanted | {".pull.lock"}
    assert all((machine.checkpoints / name).read_bytes() == main[name] for name in wanted)
    complete = {name for name, each in machine.listed().items() if each["state"] == "complete"}
    assert complete == {TURBO, LM, *SHARED}
    asked = len(hub.requests)
    assert machine.models("pull", TURBO).returncode == 0
    assert len(hub.requests) == asked


def test_a_model_with_a_repository_of_its_own_comes_with_what_the_main_one_holds(machine: Machine) -> None:
    assert machine.models("pull", "acestep-v15-base", "acestep-5Hz-lm-0.6B").returncode == 0
    found = {name for name, each in machine.listed().items() if each["state"] == "complete"}
    assert found == {"acestep-v15-base", "acestep-5Hz-lm-0.6B", *SHARED}


def test_a_language_model_is_left_out_on_request(machine: Machine) -> None:
    assert machine.models("pull", TURBO, "--no-lm").returncode == 0
    assert machine.state(LM) == "absent"


def test_ctrl_c_keeps_what_has_arrived_and_the_next_pull_goes_on_from_there(tmp_path: Path) -> None:
    # More than one of the client's blocks, so that the first ones are on the disk when the transfer stalls.
    large = 25_000_000
    with Hub(repositories=published(large), stall={WEIGHTS: 22_000_000}) as hub:
        machine = Machine(tmp_path, hub)
        command = subprocess.Popen(
            [*COMMAND, "models", "pull", TURBO, "--no-lm"],
            env=clean_environment(machine.variables),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert hub.stalled.wait(60)
        _until_some_arrived(machine)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 130
        assert "the same command goes on" in said
        assert machine.listed()[TURBO]["state"] == "incomplete"
        assert any("is cut off" in fault for fault in machine.listed()[TURBO]["faults"])
        assert machine.models("pull", TURBO, "--no-lm").returncode == 0
        firsts = [first for name, first in hub.requests if name == WEIGHTS]
        assert firsts[0] == 0
        assert firsts[-1] >= 10_000_000
        assert machine.state(TURBO) == "complete"


def _until_some_arrived(machine: Machine) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in machine.checkpoints.glob(f"{TURBO}/model.safetensors.*.incomplete")):
            return
        time.sleep(0.05)
    raise AssertionError("nothing arrived")


def test_a_cut_connection_is_resumed_within_the_same_pull(machine: Machine, hub: Hub) -> None:
    hub.cut[WEIGHTS] = 100_000
    assert machine.models("pull", TURBO).returncode == 0
    assert machine.state(TURBO) == "complete"


def test_a_cut_off_file_from_elsewhere_is_completed(machine: Machine, hub: Hub) -> None:
    content = hub.repositories["ACE-Step/Ace-Step1.5"][WEIGHTS]
    path = machine.checkpoints / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(content[:200_000])
    assert machine.models("pull", TURBO).returncode == 0
    assert path.read_bytes() == content
    assert (WEIGHTS, 200_000) in hub.requests


def test_damage_in_what_was_there_costs_the_download_but_never_the_model(machine: Machine, hub: Hub) -> None:
    path = machine.checkpoints / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0" * 200_000)
    assert machine.models("pull", TURBO).returncode == 0
    assert path.read_bytes() == hub.repositories["ACE-Step/Ace-Step1.5"][WEIGHTS]


def test_a_file_that_arrives_with_another_hash_is_not_kept(machine: Machine, hub: Hub) -> None:
    hub.served[WEIGHTS] = weights(300_000, seed=99)
    done = machine.models("pull", TURBO)
    assert done.returncode == 5
    assert f"{WEIGHTS} arrived with another hash" in done.stderr
    assert not (machine.checkpoints / WEIGHTS).exists()


def test_a_file_of_ones_own_is_not_overwritten(machine: Machine, hub: Hub) -> None:
    path = machine.checkpoints / WEIGHTS
    path.parent.mkdir(parents=True)
    path.write_bytes(weights(300_000, seed=99))
    done = machine.models("pull", TURBO)
    assert done.returncode == 5
    assert f"{path} is not the file of ACE-Step/Ace-Step1.5" in done.stderr
    assert path.read_bytes() == weights(300_000, seed=99)
    assert not hub.requests


def test_a_folder_in_diffusers_layout_stays_as_it_is(machine: Machine, hub: Hub) -> None:
    folder = machine.checkpoints / TURBO
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "AceStepPipeline"}')
    done = machine.models("pull", TURBO)
    assert done.returncode == 0, done.stderr
    assert f"{folder} is there in diffusers' layout" in done.stderr
    assert not hub.requests


def test_two_downloads_into_one_folder_are_refused(machine: Machine, hub: Hub) -> None:
    machine.checkpoints.mkdir()
    with (machine.checkpoints / ".pull.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = machine.models("pull", TURBO)
    assert done.returncode == 5
    assert "another download" in done.stderr
    assert not hub.requests


def test_a_model_that_has_no_room_is_refused_before_anything_is_downloaded(machine: Machine, hub: Hub) -> None:
    hub.claimed[WEIGHTS] = 10**16
    done = machine.models("pull", TURBO)
    assert done.returncode == 5
    assert "GB free" in done.stderr
    assert "--checkpoints" in done.stderr
    assert not hub.requests


def test_a_token_is_sent_and_its_absence_is_explained(tmp_path: Path) -> None:
    with Hub(token="hf_secret") as hub:
        machine = Machine(tmp_path, hub)
        refused = machine.models("pull", TURBO)
        assert refused.returncode == 4
        assert "HF_TOKEN" in refused.stderr
        assert machine.models("pull", TURBO, HF_TOKEN="hf_secret").returncode == 0


def test_offline_mode_and_a_hub_that_is_away_are_said_in_one_line(machine: Machine) -> None:
    offline = machine.models("pull", TURBO, HF_HUB_OFFLINE="1")
    away = machine.models("pull", TURBO, HF_ENDPOINT="http://127.0.0.1:9")
    for done, word in ((offline, "HF_HUB_OFFLINE"), (away, "HF_ENDPOINT")):
        assert done.returncode == 4
        assert word in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_an_unknown_name_lists_the_known_ones(machine: Machine) -> None:
    done = machine.models("pull", "acestep-v15-tubro")
    assert done.returncode == 2
    assert TURBO in done.stderr


def test_verify_finds_a_changed_byte_and_a_cut_off_file(machine: Machine) -> None:
    assert machine.models("pull", TURBO).returncode == 0
    fine = machine.models("verify")
    assert fine.returncode == 0, fine.stderr
    assert {line.partition("\t")[0] for line in fine.stdout.splitlines()} == {TURBO, LM, *SHARED}
    path = machine.checkpoints / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = machine.models("verify", TURBO, "--json")
    assert changed.returncode == 6
    assert json.loads(changed.stdout)["faults"] == ["model.safetensors is not the published file"]
    assert "model.safetensors is not the published file" in changed.stderr
    path.write_bytes(content[:-1])
    cut = machine.models("verify", TURBO, HF_HUB_OFFLINE="1")
    assert cut.returncode == 6
    assert "hashes" in cut.stderr
    assert "model.safetensors has" in cut.stderr


def test_list_for_programs_is_one_line_with_tabs_each(machine: Machine) -> None:
    assert machine.models("pull", "acestep-5Hz-lm-0.6B").returncode == 0
    lines = [line.split("\t") for line in machine.models("list").stdout.splitlines()]
    row = next(columns for columns in lines if columns[0] == "acestep-5Hz-lm-0.6B")
    assert row[1] == "complete"
    assert int(row[2]) > 2_000
    assert row[3] == str(machine.checkpoints / "acestep-5Hz-lm-0.6B")


def test_a_worker_without_its_model_says_which_command_downloads_it(machine: Machine) -> None:
    done = run_command("doctor", "--timeout", "1", variables=machine.variables)
    assert f"acestep-consumer models pull {TURBO} --checkpoints {machine.checkpoints}" in done.stdout
