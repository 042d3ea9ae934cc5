"""Uniform 4-bit weights, `int4`: groups of a row share a scale, and a zero point if they are asymmetric.

Groups lie along the reduction, so a scale multiplies a sum and not each product. Codes are symmetric (code - 8) or
asymmetric (code - zero); the file keeps them row by row, and kernels repack them once (`repack_int4`).
"""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from rankwise.errors import RankwiseError
from rankwise.kernels import fourbit
from rankwise.kernels.backend import use_triton
from rankwise.kernels.fragments import (
    DECODERS,
    Decoder,
    Fragments,
    from_tiles,
    from_words,
    join_nibbles,
    split_nibbles,
    to_tiles,
    to_words,
)

GROUPS = (32, 64, 128)


class Int4(NamedTuple):
    """A matrix `[m, n]` as the file keeps it.

    Args:
        codes: uint8 `[m, n / 2]`, row-major; column 2 j in the low nibble of byte j, column 2 j + 1 in the high one.
        scale: bf16 `[m, n / group]`; may be negative.
        zero: uint8 `[m, n / group]`, 0..15, or None: 8 everywhere.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None


def _ptx(dtype: torch.dtype) -> str:
    """`0x4300 | code` is 128 + code in bf16, `0x6400 | code` is 1024 + code in fp16; one addition takes the rest off.

    A mask takes the codes k and k + 4 at once: they are 16 bits apart, as the two numbers of a register. $11 is always
    zero; what it is part of is no constant, which Triton 3.6 would build anew, half by half, for every use.
    """
    one, magic, kind = {
        torch.bfloat16: (0x3F803F80, 0x43004300, "bf16x2"),
        torch.float16: (0x3C003C00, 0x64006400, "f16x2"),
    }[dtype]
    lines = [".reg .b32 one, low, v;", f"xor.b32 one, $11, {one:#x};", "xor.b32 low, $11, 0x000f000f;"]
    for k in range(4):
        lines += [f"shr.u32 v, $8, {4 * k};", f"lop3.b32 v, v, low, {magic:#x}, 0xea;"]
        lines += [f"fma.rn.{kind} v, v, one, ${9 + k % 2};", f"mov.b32 {{${2 * k}, ${2 * k + 1}}}, v;"]
    return "{" + " ".join(lines) + "}"


DECODERS["int4"] = Decoder("pqb", {dtype: _ptx(dtype) for dtype in (torch.float16, torch.bfloat16)}, None)


def quantize_int4(w: torch.Tensor, group: int = 128, symmetric: bool = True) -> Int4:
    """Round to the nearest code.

    A symmetric group's scale puts its largest number, sign and all, on code 0; an asymmetric one's spans the group
    and 0, which gets a code of its own.

    Args:
        w: `[m, n]`, floating point; `group` divides n.
        group: 32, 64 or 128 columns.
        symmetric: codes about 8 instead of about a zero point.

    Raises:
        RankwiseError: another group, one that does not divide n, or an empty w.
    """
    if group not in GROUPS:
        raise RankwiseError("group", group, ", ".join(map(str, GROUPS)))
    if w.ndim != 2 or not w.numel() or w.shape[1] % group:
        raise RankwiseError("w", tuple(w.shape), f"a matrix, not empty, whose number of columns {group} divides")
    split = w.float().unflatten(1, (-1, group))
    zero = None
    if symmetric:
        scale = (split.gather(2, split.abs().argmax(2, keepdim=True)) / -8).bfloat16()
        middle = torch.tensor(8.0, device=w.device)
    else:
        least, most = split.amin(2, keepdim=True).clamp(max=0), split.amax(2, keepdim=True).clamp(min=0)
        scale = ((most - least) / 15).bfloat16()
        middle = _over(-least, scale).round().clamp(0, 15)
        zero = middle[..., 0].to(torch.uint8)
    codes = (_over(split, scale).round() + middle).clamp(0, 15).to(torch.uint8)
    return Int4(join_nibbles(codes.flatten(1), high_first=False), scale[..., 0], zero)


def dequantize_int4(w: Int4 | Fragments, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`(code - zero) · scale`, `[m, n]`, rounded once."""
    plain = unpack_int4(w) if isinstance(w, Fragments) else w
    codes = split_nibbles(plain.codes, high_first=False).unflatten(1, (plain.scale.shape[1], -1))
    zero = 8 if plain.zero is None else plain.zero[..., None].float()
    return ((codes.float() - zero) * plain.scale[..., None].float()).flatten(1).to(dtype)


def repack_int4(w: Int4) -> Fragments:
    """The kernels' order, made once when the weights are loaded.

    Raises:
        RankwiseError: shapes that do not belong together.
    """
    (m, half), groups = w.codes.shape, w.scale.shape[-1]
    group = 2 * half // max(groups, 1)
    if group not in GROUPS or w.scale.shape != (m, 2 * half // group):
        raise RankwiseError("scale", tuple(w.scale.shape), f"[{m}, n / group] with n = {2 * half}, group in {GROUPS}")
    words = to_words(split_nibbles(w.codes, high_first=False), "int4", min(group, 64))
    zero = None if w.zero is None else to_tiles(w.zero.to(torch.int16))
    return Fragments(words, to_tiles(w.scale), zero, m, group, "int4")


def unpack_int4(w: Fragments) -> Int4:
    """The inverse of `repack_int4`."""
    codes = join_nibbles(from_words(w.words, w.name, w.m), high_first=False)
    return Int4(codes, from_tiles(w.scale, w.m), None if w.zero is None else from_tiles(w.zero, w.m).to(torch.uint8))


def int4_linear(x: torch.Tensor, w: Int4 | Fragments, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `y = x Wᵀ + b`.

    On a GPU weights in the kernels' order are decoded in registers for up to 64 tokens, and unpacked once for more;
    gradients come back to x and the bias. Elsewhere, and in the file's order, this is PyTorch's product with
    `dequantize_int4`.

    Args:
        x: `[..., n]`, floating point.
        w: `[m, n]`.
        bias: `[m]` or None.

    Returns:
        `[..., m]`.

    Raises:
        RankwiseError: x and W do not fit, on a GPU.
    """
    if isinstance(w, Fragments) and use_triton(x):
        return fourbit.product(x, w, bias)
    return linear(x, dequantize_int4(w, x.dtype), bias)


def int4_lowrank(
    x: torch.Tensor,
    v: Int4 | Fragments,
    u: Int4 | Fragments,
    bias: torch.Tensor | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Apply `y = U (V x) + b`. On a GPU, up to 16 tokens, V x stays a few partial sums in fp32, which U's kernel adds.

    Args:
        x: `[..., n]`, floating point.
        v: `[k, n]`.
        u: `[m, k]`.
        bias: `[m]` or None.
        overlap: let U's kernel fetch weights while V's still runs (from compute capability 9.0 on).

    Returns:
        `[..., m]`.
    """
    if isinstance(v, Fragments) and isinstance(u, Fragments) and use_triton(x):
        return fourbit.pair(x, v, u, bias, overlap)
    return int4_linear(int4_linear(x, v), u, bias)


def _over(a: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """a / scale; 0 for groups of zeros."""
    return torch.where(scale == 0, 0.0, a / scale.float())
