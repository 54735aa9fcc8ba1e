# SPDX-License-Identifier: Apache-2.0
"""Which GPUs ``--gpus`` means, given what torch sees and what the environment hides."""

import pytest

from acestep_consumer.multi_gpu.device_count import DeviceCount
from acestep_consumer.multi_gpu.selection import BadChoice, Gpu, GpuMissing, choose, in_pci_order, parse, visible

CUDA_ONLY = "CUDA_VISIBLE_DEVICES"


def nvidia(count: int) -> DeviceCount:
    return DeviceCount(torch="2.11.0", cuda="13.0", hip=None, count=count)


def amd(count: int) -> DeviceCount:
    return DeviceCount(torch="2.11.0", cuda=None, hip="7.1", count=count)


def entries(gpus: tuple[Gpu, ...], variable: str = CUDA_ONLY) -> list[str]:
    return [gpu.visibility[variable] for gpu in gpus]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("all", None), (" ALL ", None), ("0", (0,)), ("2", (2,)), ("0,2", (0, 2)), ("3, 1", (3, 1))],
)
def test_a_choice_is_all_or_numbers_in_their_order(text: str, numbers: tuple[int, ...] | None) -> None:
    assert parse(text) == numbers


@pytest.mark.parametrize("text", ["", "0,", "x", "-1", "1.5", "0 1", "0,0", "²", "GPU-1"])
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(BadChoice, match="--gpus"):
        parse(text)


def test_without_a_restriction_the_gpus_are_torchs_by_number() -> None:
    assert visible(nvidia(2), {}) == (Gpu(0, {CUDA_ONLY: "0"}), Gpu(1, {CUDA_ONLY: "1"}))


def test_with_a_restriction_they_are_numbered_by_their_place_in_it() -> None:
    found = visible(nvidia(3), {CUDA_ONLY: "4,5,7"})
    assert entries(choose((0, 2), found)) == ["4", "7"]
    assert [gpu.name for gpu in choose((0, 2), found)] == ["gpu0", "gpu2"]


def test_uuids_stay_as_they_are() -> None:
    assert entries(visible(nvidia(2), {CUDA_ONLY: "GPU-8932f937, GPU-1d0c"})) == ["GPU-8932f937", "GPU-1d0c"]


def test_mig_instances_each_get_a_worker_although_cuda_shows_only_one_to_a_process() -> None:
    assert entries(visible(nvidia(1), {CUDA_ONLY: "MIG-a,MIG-b,MIG-c"})) == ["MIG-a", "MIG-b", "MIG-c"]


def test_a_restriction_to_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(GpuMissing, match="CUDA_VISIBLE_DEVICES=0,7 names 2 GPUs, torch sees 1"):
        visible(nvidia(1), {CUDA_ONLY: "0,7"})


def test_on_rocm_both_names_say_the_same_and_hip_is_the_stronger() -> None:
    both = ("HIP_VISIBLE_DEVICES", CUDA_ONLY)
    for environ in ({CUDA_ONLY: "2,3"}, {"HIP_VISIBLE_DEVICES": "2,3", CUDA_ONLY: "0"}):
        found = visible(amd(2), environ)
        assert [dict(gpu.visibility) for gpu in found] == [dict.fromkeys(both, "2"), dict.fromkeys(both, "3")]


def test_on_nvidia_the_name_for_amd_means_nothing() -> None:
    assert entries(visible(nvidia(2), {"HIP_VISIBLE_DEVICES": "5"})) == ["0", "1"]


@pytest.mark.parametrize(
    ("found", "environ", "says"),
    [
        (nvidia(0), {}, "nvidia-smi"),
        (amd(0), {}, "rocm-smi"),
        (nvidia(0), {CUDA_ONLY: "9"}, "CUDA_VISIBLE_DEVICES=9; correct or unset it"),
        (nvidia(0), {CUDA_ONLY: ""}, "CUDA_VISIBLE_DEVICES=; correct or unset it"),
        (DeviceCount(torch="2.13.0+cpu", cuda=None, hip=None, count=0), {CUDA_ONLY: "0"}, "neither CUDA nor ROCm"),
    ],
)
def test_where_there_is_no_gpu_the_reason_is_told(found: DeviceCount, environ: dict[str, str], says: str) -> None:
    with pytest.raises(GpuMissing, match=says):
        visible(found, environ)


def test_a_number_that_is_too_high_is_told_with_what_there_is() -> None:
    two = visible(nvidia(2), {})
    with pytest.raises(GpuMissing, match=r"no GPU 2, 5: there are 2, numbered 0 to 1; `0,1` is two GPUs"):
        choose((0, 2, 5), two)
    with pytest.raises(GpuMissing, match="GPU 0 is the only one"):
        choose((1,), two[:1])


def test_all_is_every_gpu() -> None:
    assert choose(None, visible(nvidia(8), {})) == visible(nvidia(8), {})


def test_gpus_are_numbered_as_nvidia_smi_does_unless_somebody_chose_otherwise() -> None:
    assert in_pci_order({"HOME": "/"}) == {"HOME": "/", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert in_pci_order({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}) == {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
