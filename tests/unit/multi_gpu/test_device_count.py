# SPDX-License-Identifier: Apache-2.0
"""Asking torch for GPUs in another process: the real one, and ones that are broken."""

import os
import sys
from pathlib import Path

import pytest

from acestep_consumer.multi_gpu import device_count
from acestep_consumer.multi_gpu.device_count import DeviceCountFailed
from tests.support.worker import ROOT


def environ_with_torch(folder: Path, source: str) -> dict[str, str]:
    """An environment in which ``import torch`` runs ``source``."""
    (folder / "torch.py").write_text(source)
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


def test_torch_is_asked_and_this_process_stays_without_it(tmp_path: Path) -> None:
    torch = "class cuda: device_count = lambda: 3\nclass version: cuda = None; hip = '7.1'\n__version__ = '2.11'"
    loaded = "torch" in sys.modules
    found = device_count.ask_torch(environ_with_torch(tmp_path, f"print('a plug-in says hello')\n{torch}"))
    assert (found.torch, found.cuda, found.hip, found.count) == ("2.11", None, "7.1", 3)
    assert ("torch" in sys.modules) is loaded


def test_the_torch_that_is_installed_can_be_asked() -> None:
    hidden = device_count.ask_torch({**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    assert hidden.count == 0
    assert hidden.torch[0].isdigit()


def test_a_torch_that_is_missing_is_named_with_what_installs_it(tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    with pytest.raises(DeviceCountFailed, match=r"pip install 'acestep-consumer\[engine\]'"):
        device_count.ask_torch(environ_with_torch(tmp_path, missing))


def test_a_torch_that_breaks_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(DeviceCountFailed, match=r"libcuda\.so is of another version"):
        device_count.ask_torch(environ_with_torch(tmp_path, "raise OSError('libcuda.so is of another version')"))


def test_a_torch_that_dies_without_a_word_is_told_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(DeviceCountFailed, match="exit code 3"):
        device_count.ask_torch(environ_with_torch(tmp_path, "import os; os._exit(3)"))
