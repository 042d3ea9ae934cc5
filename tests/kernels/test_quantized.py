"""Layers in 4 and 8 bits equal the same layers with the numbers that their bytes stand for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.kernels import quantize_int4, quantize_int8, quantize_nf4
from rankwise.kernels.int4 import dequantize_int4
from rankwise.kernels.int8 import dequantize_int8
from rankwise.kernels.nf4 import dequantize_nf4
from rankwise.kernels.quantized import quantized_linear, quantized_lowrank, quantized_pivot, repack

FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "int4": (lambda w: quantize_int4(w, 32), dequantize_int4),
    "int8": (quantize_int8, dequantize_int8),
    "nf4": (quantize_nf4, dequantize_nf4),
}
formats = pytest.mark.parametrize("name", FORMATS)


def stored(name: str, rows: int, columns: int, seed: int = 0) -> tuple[Any, torch.Tensor]:
    """A random matrix as the file keeps it, and its numbers in fp64."""
    quantize, dequantize = FORMATS[name]
    w = quantize(draw(rows, columns, seed=seed) / columns**0.5)
    return w, dequantize(w).double()


def permutation(m: int) -> torch.Tensor:
    return torch.randperm(m, generator=torch.Generator().manual_seed(m)).to(DEVICE, torch.int32)


@formats
@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(0, 5), m=st.integers(66, 90), n=st.sampled_from([64, 192]), bias=st.booleans())
def test_every_kind_is_that_of_its_numbers(name: str, tokens: int, m: int, n: int, bias: bool) -> None:
    x, b = draw(tokens, n, dtype=torch.float32), draw(m, dtype=torch.float32) if bias else None
    plus = 0 if b is None else b.double()
    (w, whole), (v, v_), (u, u_) = (stored(name, *s) for s in ((m, n), (64, n), (m, 64)))
    assert relative_error(quantized_linear(x, w, b), x.double() @ whole.T + plus) < 1e-5
    assert relative_error(quantized_lowrank(x, v, u, b), x.double() @ (u_ @ v_).T + plus) < 1e-5
    (c, c_), index = stored(name, m - 64, 64, seed=2), permutation(m)
    rows = torch.cat([v_, c_ @ v_])[index.long()]
    assert relative_error(quantized_pivot(x, index, v, c, b), x.double() @ rows.T + plus) < 1e-5


@pytest.mark.parametrize(("first", "second"), [("nf4", "int4"), ("int8", "nf4"), ("int4", "int8")])
def test_formats_mix(first: str, second: str) -> None:
    x, (v, v_), (u, u_) = draw(3, 64, dtype=torch.float32), stored(first, 64, 64), stored(second, 70, 64)
    assert relative_error(quantized_lowrank(x, v, u), x.double() @ (u_ @ v_).T) < 1e-5


@needs_triton
@formats
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("tokens", [1, 5])
def test_pivots_in_the_kernels_order(name: str, dtype: torch.dtype, tokens: int) -> None:
    m = 90
    (basis, b_), (coeff, c_), index = stored(name, 64, 128), stored(name, m - 64, 64, seed=2), permutation(m)
    x, bias = draw(tokens, 128, dtype=dtype), draw(2 * m, dtype=dtype)[::2]
    with in_triton():
        y = quantized_pivot(x, index, repack(basis), repack(coeff), bias)
    rows = torch.cat([b_, c_ @ b_])[index.long()]
    assert relative_error(y, x.double() @ rows.T + bias.double()) < TOLERANCE[dtype]
