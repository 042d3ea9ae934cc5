"""Layers whose matrices are in 4 or 8 bits: `int4.py`, `nf4.py` and `int8.py` say what their bytes mean."""

import torch

from rankwise.kernels.fragments import Fragments
from rankwise.kernels.int4 import Int4, dequantize_int4, int4_linear, int4_lowrank, quantize_int4, repack_int4
from rankwise.kernels.int8 import Int8, align_int8, dequantize_int8, int8_linear, int8_lowrank, quantize_int8
from rankwise.kernels.nf4 import NF4, dequantize_nf4, nf4_linear, nf4_lowrank, quantize_nf4, repack_nf4

Stored = Int4 | NF4 | Int8  # as the file has it
Ready = Fragments | Int8  # as kernels for GPUs read it; those of int8 read the file's order
Quantized = Stored | Fragments


def repack(w: Stored) -> Ready:
    """The order of the kernels for GPUs, for long use."""
    if isinstance(w, Int8):
        return align_int8(w)
    return repack_nf4(w) if isinstance(w, NF4) else repack_int4(w)


def quantize(w: torch.Tensor, name: str, group: int | None = None, symmetric: bool = True) -> Stored:
    """Round to the nearest codes of a format, `int4`, `nf4` or `int8`; see `quantize_int4` for group and symmetric."""
    if name == "int4":
        assert group is not None
        return quantize_int4(w, group, symmetric)
    return quantize_nf4(w) if name == "nf4" else quantize_int8(w)


def dequantize(w: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers `[m, n]` that the bytes stand for, worked out in fp32 and rounded once."""
    if isinstance(w, Int8):
        return dequantize_int8(w, dtype)
    return dequantize_nf4(w, dtype) if _name(w) == "nf4" else dequantize_int4(w, dtype)  # type: ignore[arg-type]


def quantized_linear(x: torch.Tensor, w: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `y = x Wᵀ + b`, see `int4_linear`, `nf4_linear` and `int8_linear`.

    Args:
        x: `[..., n]`, floating point.
        w: `[m, n]`, as the file keeps it or in the kernels' order.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.
    """
    if isinstance(w, Int8):
        return int8_linear(x, w, bias)
    return nf4_linear(x, w, bias) if _name(w) == "nf4" else int4_linear(x, w, bias)  # type: ignore[arg-type]


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
    if isinstance(v, Int8) and isinstance(u, Int8):
        return int8_lowrank(x, v, u, bias)
    if _name(v) == _name(u) == "nf4":
        return nf4_lowrank(x, v, u, bias)  # type: ignore[arg-type]
    if _name(v) == _name(u) == "int4":
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


def _name(w: Quantized) -> str:
    return w.name if isinstance(w, Fragments) else type(w).__name__.lower()
