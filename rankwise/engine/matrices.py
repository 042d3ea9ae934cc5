"""A matrix as a layer holds it, in 16 bits or more or in 4 or 8, and the layers' arithmetic on either."""

import torch
from torch.nn.functional import linear

from rankwise.kernels import lowrank_linear, pivot_linear, quantized_linear, quantized_lowrank, quantized_pivot
from rankwise.kernels.quantized import Quantized, dequantize

Matrix = torch.Tensor | Quantized


def dequantised(w: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The numbers `[m, n]` that a matrix stands for; those in 4 or 8 bits are worked out in fp32 and rounded once."""
    return w.to(dtype) if isinstance(w, torch.Tensor) else dequantize(w, dtype)


def dense(x: torch.Tensor, w: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`W x + b`, `[..., n]` to `[..., m]`."""
    return linear(x, w, bias) if isinstance(w, torch.Tensor) else quantized_linear(x, w, bias)


def lowrank(x: torch.Tensor, v: Matrix, u: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`U (V x) + b`; both matrices are in 4 or 8 bits, or neither is."""
    if isinstance(v, torch.Tensor) and isinstance(u, torch.Tensor):
        return lowrank_linear(x, v, u, bias)
    assert not isinstance(v, torch.Tensor)
    assert not isinstance(u, torch.Tensor)
    return quantized_lowrank(x, v, u, bias)


def pivot(
    x: torch.Tensor, index: torch.Tensor, basis: Matrix, coeff: Matrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`Pᵀ [I; C] B x + b`, see `kernels.pivot_linear`; both matrices are in 4 or 8 bits, or neither is."""
    if isinstance(basis, torch.Tensor) and isinstance(coeff, torch.Tensor):
        return pivot_linear(x, index, basis, coeff, bias)
    assert not isinstance(basis, torch.Tensor)
    assert not isinstance(coeff, torch.Tensor)
    return quantized_pivot(x, index, basis, coeff, bias)
