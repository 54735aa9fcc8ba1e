# SPDX-License-Identifier: Apache-2.0
"""Errors of torch and diffusers as they are published."""

import pytest
import torch

from acestep_consumer.domain.errors import Cancelled, ConsumerError, InputUnreadable, RenderFailed, ResourceExhausted
from acestep_consumer.engine.renderer.errors import is_fatal, translate


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_every_allocator_that_gives_up_means_too_little_memory(error: Exception) -> None:
    ours = translate(error)
    assert isinstance(ours, ResourceExhausted)
    assert ours.retryable
    assert not is_fatal(error)


@pytest.mark.parametrize("error", [Cancelled(), InputUnreadable("the source audio is missing")])
def test_our_own_errors_pass_unchanged(error: ConsumerError) -> None:
    assert translate(error) is error


def test_a_refusal_of_the_pipeline_is_reported_without_its_paths() -> None:
    ours = translate(ValueError("`shift` must be > 0, got -1 in /srv/models/secret/config.json\nand more"))
    assert isinstance(ours, RenderFailed)
    assert str(ours) == "the pipeline refused the request: shift must be > 0, got -1 in …"


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch in /srv/code.py"), IndexError("x"), OSError("/srv/a")])
def test_an_unknown_error_is_reported_by_its_type_alone(error: Exception) -> None:
    assert str(translate(error)) == f"the renderer failed on this request ({type(error).__name__})"


def test_a_lost_device_is_fatal() -> None:
    assert is_fatal(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_fatal(RuntimeError("shape mismatch"))
