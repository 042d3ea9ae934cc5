"""Layers whose matrices are in 4 bits, of either format: `int4.py` and `nf4.py` say what their bytes mean."""

import torch

from rankwise.kernels.fragments import Fragments
from rankwise.kernels.int4 import Int4, dequantize_int4, int4_linear, int4_lowrank, repack_int4
from rankwise.kernels.nf4 import NF4, dequantize_nf4, nf4_linear, nf4_lowrank, repack_nf4

Quantized = Int4 | NF4 | Fragments  # as the file has it, or in the order of the kernels for GPUs


def repack(w: Int4 | NF4) -> Fragments:
    """The order of the kernels for GPUs, for long use."""
    return repack_nf4(w) if isinstance(w, NF4) else repack_int4(w)


def dequantize(w: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers `[m, n]` that the bytes stand for, worked out in fp32 and rounded once."""
    return dequantize_nf4(w, dtype) if _is_nf4(w) else dequantize_int4(w, dtype)  # type: ignore[arg-type]


def quantized_linear(x: torch.Tensor, w: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `y = x Wᵀ + b`, see `int4_linear` and `nf4_linear`.

    Args:
        x: `[..., n]`, floating point.
        w: `[m, n]`, as the file keeps it or in the kernels' order.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    return nf4_linear(x, w, bias) if _is_nf4(w) else int4_linear(x, w, bias)  # type: ignore[arg-type]


def quantized_lowrank(x: torch.Tensor, v: Quantized, u: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `y = U (V x) + b`; U and V may be of different formats.

    Args:
        x: `[..., n]`, floating point.
        v: `[k, n]`.
        u: `[m, k]`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    if _is_nf4(v) and _is_nf4(u):
        return nf4_lowrank(x, v, u, bias)  # type: ignore[arg-type]
    if not _is_nf4(v) and not _is_nf4(u):
        return int4_lowrank(x, v, u, bias)  # type: ignore[arg-type]
    return quantized_linear(quantized_linear(x, v), u, bias)


def quantized_pivot(
    x: torch.Tensor,
    index: torch.Tensor,
    basis: Quantized,
    coeff: Quantized,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply `W ≈ Pᵀ [I; C] B`, see `pivot_linear`.

    Args:
        x: `[..., n]`, floating point.
        index: `[m]` int32, a permutation.
        basis: `[k, n]`.
        coeff: `[m - k, k]`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    pivots = quantized_linear(x, basis)
    y = torch.cat([pivots, quantized_linear(pivots, coeff)], dim=-1).index_select(-1, index)
    return y if bias is None else y + bias


def _is_nf4(w: Quantized) -> bool:
    return isinstance(w, NF4) or (isinstance(w, Fragments) and w.name == "nf4")
