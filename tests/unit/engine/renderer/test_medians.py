# SPDX-License-Identifier: Apache-2.0
"""Medians of rows and columns: torch's and the kernel's, run by Triton's interpreter, against NumPy's."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from acestep_consumer.engine.renderer.medians import COLUMNS, ROWS, run_kernel, subtract_medians

_KERNELS = "acestep_consumer.engine.renderer.median_kernels"
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
