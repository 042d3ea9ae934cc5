"""RMSNorm equals its formula in fp64, whatever the strides."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.errors import RankwiseError
from rankwise.kernels.norm import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = [(7, 64), (5, 1), (1, 130), (3, 600), (2, 3, 20), (0, 16), (2, 1, 2, 9)]
BACKENDS = [
    *(pytest.param(dtype, None, id=f"torch-{dtype}".replace("torch.", "")) for dtype in TOLERANCE),
    *(pytest.param(d, "triton", id=f"triton-{d}".replace("torch.", ""), marks=needs_triton) for d in TRITON_DTYPES),
]
EITHER = [None, pytest.param("triton", marks=needs_triton)]


def running(backend: str | None) -> Any:
    return in_triton() if backend else nullcontext()


def exact(x: torch.Tensor, weight: torch.Tensor, offset: bool = False) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("offset", [False, True], ids=["weight", "1+weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_equals_the_formula(dtype: torch.dtype, backend: str | None, shape: tuple[int, ...], offset: bool) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)
    with running(backend):
        y = rms_norm(x, weight, EPS, offset)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert relative_error(y, exact(x, weight, offset)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_adds_before_it_norms(dtype: torch.dtype, backend: str | None, shape: tuple[int, ...]) -> None:
    x, residual, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype)
    with running(backend):
        y, total = add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(rms_norm(total, weight, EPS), y)  # the sum is rounded first
    assert torch.equal(total, x + residual)
    assert relative_error(y, exact(x + residual, weight)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", EITHER)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_heads_of_a_packed_projection(dim: int, backend: str | None) -> None:
    packed, weight = draw(5, 6 * dim, dtype=torch.float32), draw(dim, dtype=torch.float32)
    x = packed[:, dim : 5 * dim].unflatten(1, (4, dim))
    with running(backend):
        y, total = add_rms_norm(x, x, weight, EPS)
        assert relative_error(rms_norm(x, weight, EPS), exact(x, weight)) <= 1e-5
    assert y.is_contiguous()
    assert torch.equal(total, x + x)
    assert relative_error(y, exact(x + x, weight)) <= 1e-5


@pytest.mark.parametrize("backend", EITHER)
def test_any_strides(backend: str | None) -> None:
    weight = draw(12, dtype=torch.float32)
    base = draw(12, 4, 3, dtype=torch.float32)
    with running(backend):
        for x in (base.permute(1, 2, 0), base.permute(2, 1, 0), base[:, 0].T, base[:, :, :1].permute(2, 1, 0)):
            assert relative_error(rms_norm(x, weight, EPS), exact(x, weight)) <= 1e-5


@pytest.mark.parametrize("backend", EITHER)
def test_a_row_of_one_size_gives_the_weight(backend: str | None) -> None:
    weight = torch.arange(-8.0, 8.0)
    x = torch.full((3, 16), 4.0)
    x[1].neg_()
    x[2].zero_()
    with running(backend):
        y = rms_norm(x.to(draw(1).device), weight.to(draw(1).device), 0.0 + 1e-30)
    assert torch.allclose(y.cpu()[:2], torch.stack((weight, -weight)), rtol=1e-6)
    assert not y[2].any()


@pytest.mark.parametrize("backend", EITHER)
def test_weight_may_be_of_another_dtype(backend: str | None) -> None:
    x, weight = draw(4, 32, dtype=torch.float16), draw(32, dtype=torch.float32)
    with running(backend):
        y = rms_norm(x, weight, EPS)
    assert y.dtype == torch.float16
    assert relative_error(y, exact(x, weight)) <= 1e-3


@needs_triton
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), n=st.integers(1, 70), power=st.integers(-12, 12))
def test_rows_do_not_know_of_each_other(rows: int, n: int, power: int) -> None:
    x, weight = draw(rows, n, dtype=torch.float32) * 2.0**power, draw(n, dtype=torch.float32)
    with in_triton():
        y = rms_norm(x, weight, EPS)
        assert torch.equal(rms_norm(x[-1:], weight, EPS)[0], y[-1])
    assert relative_error(y, exact(x, weight)) <= 1e-5


@needs_triton
def test_the_operation_keeps_its_promises_to_the_compiler() -> None:
    x, weight = draw(3, 8, dtype=torch.float32), draw(8, dtype=torch.float32)
    for residual in (None, x.clone()):
        checks = ["test_schema", "test_faketensor"]
        torch.library.opcheck(torch.ops.rankwise.rms_norm, (x, residual, weight, EPS, False), test_utils=checks)


def test_shapes_must_agree() -> None:
    x = draw(3, 8)
    with pytest.raises(RankwiseError, match="weight"):
        rms_norm(x, draw(7))
    with pytest.raises(RankwiseError, match="residual"):
        add_rms_norm(x, x[:2], draw(8))
