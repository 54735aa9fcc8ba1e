# SPDX-License-Identifier: Apache-2.0
"""Medians of rows and columns: torch's and the kernel's, run by Triton's interpreter, against NumPy's."""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from acestep_consumer.engine.renderer import measure
from acestep_consumer.engine.renderer.lyrics import medians
from acestep_consumer.engine.renderer.lyrics.medians import (
    COLUMNS,
    LONGEST_LINES,
    ROWS,
    kernels_for,
    kernels_ready_after,
    longest_line,
    run_kernel,
    subtract_medians,
)
from acestep_consumer.policy.tiers import MAX_DURATION_S

_KERNELS = "acestep_consumer.engine.renderer.lyrics.median_kernels"
SHAPES = [(1, 1, 1), (2, 3, 7), (1, 6, 8), (2, 8, 5), (3, 9, 1)]
LONG = [((1, 2, 1100), ROWS), ((1, 1030, 3), COLUMNS)]
CASES = [*((shape, dim) for shape in SHAPES for dim in (ROWS, COLUMNS)), *LONG]


def matrices(shape: tuple[int, ...], *, equal: bool) -> torch.Tensor:
    """Numbers of many magnitudes; ``equal``: many are the same, zero among them."""
    noise = torch.Generator().manual_seed(sum(shape))
    if equal:
        return torch.randint(0, 3, shape, generator=noise) / 7
    return torch.randn(shape, generator=noise).mul(9).exp()


def wanted(values: torch.Tensor, dim: int) -> torch.Tensor:
    found = values.numpy()
    lower, upper = (
        torch.from_numpy(np.quantile(found, 0.5, axis=dim, keepdims=True, method=method))
        for method in ("lower", "higher")
    )
    return (values - 2 * torch.lerp(lower, upper, 0.5)).relu()


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The kernel, interpreted: whether it is, is decided when it is defined, and so for Triton's own functions."""
    triton = pytest.importorskip("triton")
    language, standard = triton.language, triton.language.standard
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        for name, own in list(vars(standard).items()):
            if isinstance(own, triton.JITFunction):
                interpreted = triton.jit(own.fn)
                patched.setattr(standard, name, interpreted)
                if vars(language).get(name) is own:
                    patched.setattr(language, name, interpreted)
        patched.delitem(sys.modules, _KERNELS, raising=False)
        yield importlib.import_module(_KERNELS)
        sys.modules.pop(_KERNELS, None)


@pytest.mark.parametrize("equal", [False, True], ids=["different", "many equal"])
@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
class TestMedians:
    def test_torch_subtracts_them_to_the_bit(self, shape: tuple[int, ...], dim: int, equal: bool) -> None:  # noqa: FBT001
        values = matrices(shape, equal=equal)
        assert torch.equal(subtract_medians(values.clone(), dim), wanted(values, dim))

    def test_the_kernel_subtracts_them_to_the_bit(
        self,
        shape: tuple[int, ...],
        dim: int,
        equal: bool,  # noqa: FBT001
        kernels: ModuleType,
    ) -> None:
        values = matrices(shape, equal=equal)
        assert torch.equal(run_kernel(kernels, values.clone(), dim), wanted(values, dim))


def test_what_is_no_number_stays_none(kernels: ModuleType) -> None:
    """So that an alignment of such attention can be told from a good one."""
    values = matrices((1, 6, 8), equal=False)
    values[0, 2, 3] = torch.nan
    for dim in (ROWS, COLUMNS):
        assert run_kernel(kernels, values.clone(), dim)[0, 2, 3].isnan()
        assert subtract_medians(values.clone(), dim)[0, 2, 3].isnan()


def test_there_is_a_kernel_ready_for_the_lines_of_any_song() -> None:
    ready = dict(LONGEST_LINES)
    frames, tokens = int(MAX_DURATION_S * 12.5), 2048
    assert {longest_line(count) for count in range(1, frames + 1)} == set(ready[ROWS])
    assert {longest_line(count) for count in range(1, tokens + 1)} == set(ready[COLUMNS])


def test_kernels_are_compiled_while_the_models_warm_up_and_compared_after(monkeypatch: pytest.MonkeyPatch) -> None:
    warming_up, seen = threading.Event(), []

    def compile_beside(_: torch.device) -> None:
        assert warming_up.wait(10)
        seen.append("compiled")

    monkeypatch.setattr(medians, "_compile", compile_beside)
    monkeypatch.setattr(medians, "kernels_for", lambda device: seen.append(f"compared on {device}"))
    with kernels_ready_after(torch.device("cuda", 0)):
        warming_up.set()
    assert seen == ["compiled", "compared on cuda:0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels do not fail here")
def test_kernels_that_fail_at_the_start_are_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medians, "kernels_for", kernels_for.__wrapped__)
    with capture_logs() as logs, kernels_ready_after(torch.device("cuda", 0)):
        pass
    (warning,) = logs
    assert warning["event"] == "lyrics are aligned without the median kernel, which is slower: it fails"
    assert warning["log_level"] == "warning"


def test_the_start_of_a_renderer_readies_the_kernels_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    @contextmanager
    def readying(device: torch.device) -> Iterator[None]:
        seen.append(device)
        yield
        seen.append("ready")

    monkeypatch.setattr(measure, "kernels_ready_after", readying)
    monkeypatch.setattr(measure, "_warm_up", lambda runner, _: seen.append(runner))
    measure.measure(["a model"], torch.device("cpu"), lambda _: None)  # type: ignore[list-item]  # warmed up above
    assert seen == [torch.device("cpu"), "a model", "ready"]
