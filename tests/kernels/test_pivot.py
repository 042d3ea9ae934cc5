"""Pivot layers equal the dense product that they stand for."""

import pytest
import torch
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.kernels import pivot_linear

M, N, K = 12, 9, 4
LEADING = [pytest.param(shape, id="x".join(map(str, (*shape, N)))) for shape in [(), (5,), (2, 3), (0,), (2, 1, 3)]]


def layer(rank: int = K, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight whose rows are put together one by one, and the three tensors that describe it."""
    basis, coeff = draw(rank, N), draw(M - rank, rank)
    index = torch.randperm(M, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.int32)
    rows = []
    for entry in index.tolist():
        rows.append(basis[entry] if entry < rank else sum(coeff[entry - rank, j] * basis[j] for j in range(rank)))
    return torch.stack(rows), index, basis, coeff


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equals_the_dense_product(dtype: torch.dtype, leading: tuple[int, ...], with_bias: bool) -> None:
    weight, index, basis, coeff = layer()
    x, bias = draw(*leading, N, dtype=dtype), draw(M, dtype=dtype) if with_bias else None
    y = pivot_linear(x, index, basis.to(dtype), coeff.to(dtype), bias)
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.shape == (*leading, M)
    assert relative_error(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_any_rank_and_any_order_of_rows(rank: int, seed: int) -> None:
    weight, index, basis, coeff = layer(rank, seed)
    assert relative_error(pivot_linear(draw(5, N), index, basis, coeff), draw(5, N) @ weight.T) < 1e-13


@needs_triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8])
def test_one_hot_inputs_read_columns(rank: int, dtype: torch.dtype) -> None:
    """All of them, one after another; small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(rank)
    basis, coeff = (
        torch.randint(-3, 4, size, generator=generator).to(DEVICE, dtype) for size in ((rank, N), (M - rank, rank))
    )
    index = torch.randperm(M, generator=generator).to(DEVICE, torch.int32)
    weight = torch.cat([basis.double(), coeff.double() @ basis.double()])[index.long()]
    with in_triton():
        y = pivot_linear(torch.eye(N, dtype=dtype, device=DEVICE), index, basis, coeff)
        single = [pivot_linear(row, index, basis, coeff) for row in torch.eye(N, dtype=dtype, device=DEVICE)]
    assert torch.equal(y.double(), weight.T)
    assert torch.equal(torch.stack(single), y)


def test_gradient_reaches_the_input() -> None:
    weight, index, basis, coeff = layer()
    x, weights = draw(3, N).requires_grad_(), draw(3, M)
    (pivot_linear(x, index, basis, coeff, draw(M)) * weights).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, weights @ weight) < 1e-13


def test_inputs_stay_as_they_are() -> None:
    _, index, basis, coeff = layer()
    tensors = [draw(3, N), index, basis, coeff, draw(M)]
    copies = [tensor.clone() for tensor in tensors]
    pivot_linear(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
