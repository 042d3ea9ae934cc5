"""Uniform 8-bit weights, `int8`: a row has one scale, which multiplies the finished sum; any number of columns fits."""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from rankwise.errors import RankwiseError
from rankwise.kernels import eightbit
from rankwise.kernels.backend import use_triton

MOST = 127  # codes are symmetric about 0


class Int8(NamedTuple):
    """A matrix `[m, n]` as the file keeps it.

    Args:
        codes: int8 `[m, n]`, -127..127.
        scale: bf16 `[m, 1]`, not negative.
    """

    codes: torch.Tensor
    scale: torch.Tensor


def quantize_int8(w: torch.Tensor) -> Int8:
    """Round to the nearest code; a row's largest number becomes 127 or -127.

    Args:
        w: `[m, n]`, floating point.

    Raises:
        RankwiseError: no matrix, or an empty one.
    """
    if w.ndim != 2 or not w.numel():
        raise RankwiseError("w", tuple(w.shape), "a matrix, not empty")
    scale = (w.float().abs().amax(1, keepdim=True) / MOST).bfloat16()
    codes = torch.where(scale == 0, 0.0, w.float() / scale.float()).round().clamp(-MOST, MOST)
    return Int8(codes.to(torch.int8), scale)


def dequantize_int8(w: Int8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`code · scale`, `[m, n]`, rounded once."""
    return (w.codes.float() * w.scale.float()).to(dtype)


def take_rows(table: Int8, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `[..., n]` of a matrix by their numbers `[...]`."""
    return dequantize_int8(Int8(table.codes[ids], table.scale[ids]), dtype)


def align_int8(w: Int8) -> Int8:
    """The same matrix with rows that begin at multiples of 16 bytes, as kernels for GPUs read them best.

    Numbers are shared where they lie so already; tensors never are: a module may let go of its own.
    """
    n = w.codes.shape[1]
    codes, scale = w.codes.contiguous().detach(), w.scale.detach()
    return Int8(torch.nn.functional.pad(codes, (0, -n % eightbit.WIDTH))[:, :n] if n % eightbit.WIDTH else codes, scale)


def int8_linear(x: torch.Tensor, w: Int8, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `y = x Wᵀ + b`.

    On a GPU codes are decoded in registers for up to 64 tokens, and written out once for more. Elsewhere, and where x
    wants a gradient, this is PyTorch's product with `dequantize_int8`.

    Args:
        x: `[..., n]`, floating point.
        w: `[m, n]`; see `align_int8`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.

    Raises:
        RankwiseError: x and W do not fit, on a GPU.
    """
    if _by_kernels(x):
        return eightbit.product(x, w.codes, w.scale, bias)
    return linear(x, dequantize_int8(w, x.dtype), bias)


def int8_lowrank(
    x: torch.Tensor, v: Int8, u: Int8, bias: torch.Tensor | None = None, overlap: bool = False
) -> torch.Tensor:
    """Apply `y = U (V x) + b`. On a GPU, up to 16 tokens, V x stays a few partial sums in fp32, which U's kernel adds.

    Args:
        x: `[..., n]`, floating point.
        v: `[k, n]`.
        u: `[m, k]`.
        bias: `[m]` or None.
        overlap: let U's kernel start while V's still runs (from compute capability 9.0 on).

    Returns:
        `[..., m]`.
    """
    if _by_kernels(x):
        return eightbit.pair(x, v, u, bias, overlap)
    return int8_linear(int8_linear(x, v), u, bias)


def _by_kernels(x: torch.Tensor) -> bool:
    return use_triton(x) and not (torch.is_grad_enabled() and x.requires_grad)
