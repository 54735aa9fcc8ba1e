# SPDX-License-Identifier: Apache-2.0
"""What differs from worker to worker."""

import pytest

from acestep_consumer.config import cores
from acestep_consumer.config import settings as settings_module
from acestep_consumer.config.settings import Settings
from acestep_consumer.multi_gpu.placement import ConflictingSetting, Placement, check, place
from acestep_consumer.multi_gpu.selection import Gpu

GPUS = (Gpu(0, {"CUDA_VISIBLE_DEVICES": "4"}), Gpu(2, {"CUDA_VISIBLE_DEVICES": "MIG-a"}))


def settings(**variables: str) -> Settings:
    return settings_module.load(environ=variables, env_file=None)


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)


def placements(**variables: str) -> tuple[Placement, ...]:
    return place(GPUS, settings(**variables), log_format="json")


def test_each_worker_gets_its_gpu_its_name_and_the_next_port() -> None:
    first, second = placements(ACESTEP_WORKER_ID="host", ACESTEP_HTTP_PORT="9000")
    assert (first.name, second.name) == ("gpu0", "gpu2")
    assert first.environment == {
        "CUDA_VISIBLE_DEVICES": "4",
        "ACESTEP_DEVICE": "cuda:0",
        "ACESTEP_WORKER_ID": "host-gpu0",
        "ACESTEP_HTTP_PORT": "9000",
        "ACESTEP_LOG_FORMAT": "json",
        "ACESTEP_ENCODERS": "4",
    }
    assert second.environment == dict(first.environment) | {
        "CUDA_VISIBLE_DEVICES": "MIG-a",
        "ACESTEP_WORKER_ID": "host-gpu2",
        "ACESTEP_HTTP_PORT": "9001",
    }


def test_a_worker_reads_its_placement_without_complaint() -> None:
    for each in placements(ACESTEP_WORKER_ID="host"):
        loaded = settings(**each.environment)
        assert loaded.worker.worker_id == each.environment["ACESTEP_WORKER_ID"]
        check(loaded.engine.model_copy(update={"device": "auto"}))


@pytest.mark.parametrize(("wanted", "each"), [("3", "3"), ("7", "4")])
def test_a_number_of_encoders_that_is_set_holds_for_each_worker_as_far_as_cores_reach(wanted: str, each: str) -> None:
    assert {place.environment["ACESTEP_ENCODERS"] for place in placements(ACESTEP_ENCODERS=wanted)} == {each}


def test_port_0_stays_0_for_all() -> None:
    assert {each.environment["ACESTEP_HTTP_PORT"] for each in placements(ACESTEP_HTTP_PORT="0")} == {"0"}


def test_without_a_name_the_workers_of_two_groups_on_a_host_differ() -> None:
    names = {each.environment["ACESTEP_WORKER_ID"] for each in placements()}
    assert len(names) == 2
    assert all(name.endswith(("-gpu0", "-gpu2")) for name in names)
    assert len({name.rpartition("-")[0] for name in names}) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "cuda:0", "xpu", "mps"])
def test_a_device_that_is_set_contradicts_the_choice_of_gpus(device: str) -> None:
    with pytest.raises(ConflictingSetting, match=f"ACESTEP_DEVICE={device}"):
        check(settings(ACESTEP_DEVICE=device).engine)


@pytest.mark.parametrize("device", ["auto", "cuda", "CUDA"])
def test_a_device_that_leaves_the_choice_open_does_not(device: str) -> None:
    check(settings(ACESTEP_DEVICE=device).engine)


def test_the_language_model_stays_on_its_workers_gpu_or_on_the_cpu() -> None:
    for device in ("auto", "cuda", "cuda:0", "cpu"):
        check(settings(ACESTEP_LM_DEVICE=device).engine)
    with pytest.raises(ConflictingSetting, match="ACESTEP_LM_DEVICE=cuda:1"):
        check(settings(ACESTEP_LM_DEVICE="cuda:1").engine)


def test_a_name_or_port_without_room_for_all_workers_is_refused() -> None:
    with pytest.raises(ConflictingSetting, match="ACESTEP_WORKER_ID"):
        placements(ACESTEP_WORKER_ID="w" * 125)
    with pytest.raises(ConflictingSetting, match="ACESTEP_HTTP_PORT=65535"):
        placements(ACESTEP_HTTP_PORT="65535")
