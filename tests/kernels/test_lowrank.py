"""Low-rank layers equal the dense product that they stand for."""

import pytest
import torch
from tensors import TOLERANCE, draw, relative_error

from rankwise.kernels import lowrank_linear

M, N, K = 12, 9, 4
LEADING = [pytest.param(shape, id="x".join(map(str, (*shape, N)))) for shape in [(), (5,), (2, 3), (0,), (2, 1, 3)]]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equals_the_dense_product(dtype: torch.dtype, leading: tuple[int, ...], with_bias: bool) -> None:
    x, u, v = draw(*leading, N, dtype=dtype), draw(M, K, dtype=dtype), draw(K, N, dtype=dtype)
    bias = draw(M, dtype=dtype) if with_bias else None
    y = lowrank_linear(x, v, u, bias)
    expected = x.double() @ (u.double() @ v.double()).T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.shape == (*leading, M)
    assert relative_error(y, expected) <= TOLERANCE[dtype]


def test_gradient_reaches_the_input() -> None:
    x, u, v = draw(3, N).requires_grad_(), draw(M, K), draw(K, N)
    weights = draw(3, M)
    (lowrank_linear(x, v, u, draw(M)) * weights).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, weights @ u @ v) < 1e-13


def test_inputs_stay_as_they_are() -> None:
    tensors = [draw(3, N), draw(K, N), draw(M, K), draw(M)]
    copies = [tensor.clone() for tensor in tensors]
    lowrank_linear(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
